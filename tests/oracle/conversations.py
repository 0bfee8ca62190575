"""Conversations of every kind that people train on, as rows."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
Row = dict[str, Any]


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def _tool(text: str, number: int = 0) -> Message:
    return {"role": "tool", "content": text, "name": "get_weather", "tool_call_id": f"call_{number:05}"}


def _call(city: str, number: int = 0) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"id": f"call_{number:05}", "type": "function", "function": function}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city."}},
                "required": ["city"],
            },
        },
    }
]

ASK, ANSWER = _user("Which animal jumps?"), _assistant("The quick brown fox jumps.")
AGAIN, MORE = _user("Over what?"), _assistant("Over the lazy dog.")
THIRD, LAST = _user("How often?"), _assistant("Again and again.")
BRIEF = _system("Answer in one sentence.")
WEATHER, FOUND = _user("How is the weather in Rome?"), _assistant("It is sunny in Rome.")
THOUGHT, OTHER_THOUGHT = "The user asks who jumps. It is the fox.", "Now they want to know over what."
CALLS, RESULT = _assistant("", tool_calls=[_call("Rome, Italy")]), _tool('{"sky": "sunny"}')
ASK_FOR_BOTH = _user("How is the weather in Rome and in Oslo?")


def _thinking(message: Message, thought: str) -> Message:
    return {**message, "reasoning_content": thought}


def _thinking_aloud(message: Message, thought: str) -> Message:
    return {**message, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}


def _row(*messages: Message, tools: bool = False) -> Row:
    return {"messages": list(messages), **({"tools": TOOLS} if tools else {})}


CONVERSATIONS: dict[str, Row] = {
    "one_turn": _row(ASK, ANSWER),
    "one_turn_with_system": _row(BRIEF, ASK, ANSWER),
    "several_turns": _row(ASK, ANSWER, AGAIN, MORE, THIRD, LAST),
    "several_turns_with_system": _row(BRIEF, ASK, ANSWER, AGAIN, MORE),
    "tools_not_called": _row(ASK, ANSWER, tools=True),
    "tool_call": _row(WEATHER, CALLS, tools=True),
    "tool_call_and_result": _row(WEATHER, CALLS, RESULT, FOUND, tools=True),
    "tool_call_with_system": _row(BRIEF, WEATHER, CALLS, RESULT, FOUND, tools=True),
    "tool_call_with_content": _row(WEATHER, {**CALLS, "content": "Let me look that up."}, RESULT, FOUND, tools=True),
    "tool_call_without_content": _row(
        WEATHER, {"role": "assistant", "tool_calls": [_call("Rome, Italy")]}, RESULT, FOUND, tools=True
    ),
    "parallel_tool_calls": _row(
        ASK_FOR_BOTH,
        _assistant("", tool_calls=[_call("Rome, Italy"), _call("Oslo, Norway", 1)]),
        RESULT,
        _tool('{"sky": "grey"}', 1),
        _assistant("Sunny in Rome, grey in Oslo."),
        tools=True,
    ),
    "tool_calls_in_a_row": _row(
        ASK_FOR_BOTH,
        CALLS,
        RESULT,
        _assistant("", tool_calls=[_call("Oslo, Norway", 1)]),
        _tool('{"sky": "grey"}', 1),
        _assistant("Sunny in Rome, grey in Oslo."),
        tools=True,
    ),
    "tool_call_then_other_turns": _row(WEATHER, CALLS, RESULT, FOUND, ASK, ANSWER, tools=True),
    "reasoning": _row(ASK, _thinking(ANSWER, THOUGHT)),
    "reasoning_with_system": _row(BRIEF, ASK, _thinking(ANSWER, THOUGHT)),
    "reasoning_in_the_last_turn": _row(ASK, ANSWER, AGAIN, _thinking(MORE, OTHER_THOUGHT)),
    "reasoning_in_every_turn": _row(ASK, _thinking(ANSWER, THOUGHT), AGAIN, _thinking(MORE, OTHER_THOUGHT)),
    "reasoning_before_a_tool_call": _row(
        WEATHER, _thinking(CALLS, "I need the tool."), RESULT, _thinking(FOUND, "It says sunny."), tools=True
    ),
    "reasoning_in_the_content": _row(ASK, _thinking_aloud(ANSWER, THOUGHT)),
    "reasoning_in_the_content_of_every_turn": _row(
        ASK, _thinking_aloud(ANSWER, THOUGHT), AGAIN, _thinking_aloud(MORE, OTHER_THOUGHT)
    ),
    "empty_reasoning": _row(ASK, _thinking(ANSWER, "")),
    "empty_reasoning_in_the_content": _row(ASK, _thinking_aloud(ANSWER, "")),
    "empty_content": _row(ASK, _assistant("")),
    "empty_content_in_an_earlier_turn": _row(ASK, _assistant(""), AGAIN, MORE),
    "empty_system": _row(_system(""), ASK, ANSWER),
    "unicode": _row(
        _user("Wie heißt „Fuchs“ auf Griechisch? 🦊 e\u0301"), _assistant("Αλεπού, 狐, лиса, ثعلب 🦊👩‍🚀 e\u0301.")
    ),
    "trailing_white_space": _row(
        _user("Which animal jumps?  \n"), _assistant("The fox.  \n\n"), AGAIN, _assistant("The dog. ")
    ),
    "leading_white_space": _row(
        _user("  Which animal jumps?"), _assistant("\n\n The fox."), AGAIN, _assistant(" The dog.")
    ),
    "several_lines": _row(ASK, _assistant("- the fox\n- the dog\n\n```py\nprint('<fox>')\n```")),
}

KINDS: dict[str, tuple[str, ...]] = {
    "one turn": ("one_turn", "one_turn_with_system", "unicode", "several_lines"),
    "several turns": ("several_turns", "several_turns_with_system", "trailing_white_space", "leading_white_space"),
    "tools": ("tools_not_called", "tool_call", "tool_call_and_result", "tool_call_with_system"),
    "more calls": (
        "tool_call_with_content",
        "tool_call_without_content",
        "parallel_tool_calls",
        "tool_calls_in_a_row",
        "tool_call_then_other_turns",
    ),
    "reasoning": ("reasoning", "reasoning_with_system", "empty_reasoning"),
    "in several turns": ("reasoning_in_the_last_turn", "reasoning_in_every_turn", "reasoning_before_a_tool_call"),
    "in contents": (
        "reasoning_in_the_content",
        "reasoning_in_the_content_of_every_turn",
        "empty_reasoning_in_the_content",
    ),
    "empty texts": ("empty_content", "empty_content_in_an_earlier_turn", "empty_system"),
}
"""Conversations of one kind, for the table."""
