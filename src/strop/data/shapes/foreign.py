"""Rows in the shapes of other tools, rewritten as strop's own. Floor 2.

In: a row without its nulls. Out: the same row, or one with `messages`, `prompt` and the completion columns that
`examples` validates. Nothing is decided here that `examples` would have to trust: what cannot be rewritten is left for
it to refuse. A `system` column stays where it is; `extra_columns` knows what it means for every shape.

    DataRecord        {"inputs": {"question", "context"?}, "outputs": {"answer"}, "schema_version", "meta", "id"}
    question rows     {"question"} or {"instruction"}, with "input" or "context" and "history"?; an answer, a pair, or
                      response_j and response_k (j is the better one)
    transcripts       chosen and rejected as "\\n\\nHuman: ...\\n\\nAssistant: ..."
    sharegpt          {"conversations": [{"from", "value"}]}, with chosen and rejected for pairs
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.shapes.json_columns import parsed
from strop.data.shapes.messages import text_of, wrong_type
from strop.types import RowShape

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
QUESTIONS = ("question", "instruction")
"""Where a question may stand, if there is no prompt column."""

ADDITIONS = ("input", "context")
"""What belongs to a question; it follows behind a blank line."""

ANSWERS = ("answer", "response", "output")
"""Where the answer to a question may stand, if there is no completion column."""

BETTER_AND_WORSE = ("response_j", "response_k")
"""The sides of a pair of stack-exchange."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def own_shape(
    data: Mapping[str, Any], rows: RowShape, *, prompt: str, completions: Sequence[str], keeps_transcripts: bool = False
) -> Mapping[str, Any]:
    """The row in a shape of strop's own.

    Args:
        prompt, completions: the names of these columns.
        keeps_transcripts: split transcripts as the text that they are, instead of into turns.

    Raises:
        RowRefused: it is of another tool's shape, and broken.
    """
    if "messages" in data:
        if prompt in data or any(side not in data for side in completions):
            return data
        leads_up = rows == "pair" or not is_answered(data["messages"])
        return {**_without(data, "messages"), prompt: data["messages"]} if leads_up else data
    if isinstance(data.get("conversations"), list | tuple):
        return _sharegpt(data, rows, prompt, completions)
    if rows == "pair":
        if all(side in data for side in BETTER_AND_WORSE) and not any(side in data for side in completions):
            data = {**data, **{side: data[of] for side, of in zip(completions, BETTER_AND_WORSE, strict=True)}}
        if prompt not in data and all(_is_transcript(data.get(side)) for side in completions):
            return _transcripts(data, prompt, completions, keeps_transcripts)
    elif isinstance(data.get("inputs"), Mapping) and isinstance(data.get("outputs"), Mapping):
        return _data_record(data, prompt, completions[0])
    return _question(data, rows, prompt, completions)


def is_answered(turns: Any) -> bool:
    """Whether a conversation ends with an answer; one that does not is what leads up to completions beside it."""
    last = turns[-1] if isinstance(turns, list | tuple) and turns else None
    return not isinstance(last, Mapping) or last.get("role") == "assistant"


def _without(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in names}


def _data_record(data: Mapping[str, Any], prompt: str, completion: str) -> Mapping[str, Any]:
    """A DataRecord (docs/data.md): the prompt is the question, a blank line and the context."""
    inputs, outputs = data["inputs"], data["outputs"]
    for place, part, key in (("inputs", inputs, "question"), ("outputs", outputs, "answer")):
        if key not in part:
            raise RowRefused("missing_field", f"{place}.{key} is missing", expected="a DataRecord (docs/data.md)")
        if not isinstance(part[key], str):
            raise RowRefused("wrong_type", f"{place}.{key} is no text", expected="a text")
    context = inputs.get("context")
    if context is not None and not isinstance(context, str):
        raise RowRefused("wrong_type", "inputs.context is no text", expected="a text, null, or nothing")
    words = inputs["question"] + ("\n\n" + context if context and context.strip() else "")
    if not inputs["question"].strip():
        raise RowRefused("empty_field", "inputs.question is blank", expected="a text")
    return {**data, prompt: words, completion: text_of(outputs["answer"], "outputs.answer")}


def _question(data: Mapping[str, Any], rows: RowShape, prompt: str, completions: Sequence[str]) -> Mapping[str, Any]:
    """A question with what belongs to it as the prompt, and its answer as the completion."""
    names = (prompt,) if prompt in data else QUESTIONS
    question = next((key for key in names if key in QUESTIONS and isinstance(data.get(key), str)), None)
    answer = next((key for key in (*completions, *ANSWERS) if key in data), None)
    if question is None or answer is None:
        return data
    words = [data[question]]
    for key in ADDITIONS:
        more = data.get(key, "")
        if not isinstance(more, str):
            raise RowRefused("wrong_type", f"{key} is no text", expected=f"a text that belongs to {question}, or null")
        words += [more] if more.strip() and key not in completions and key != prompt else []
    if not words[0].strip():
        raise RowRefused("empty_field", f"{question} is blank", expected="a text")
    text = "\n\n".join(words)
    history = _history(data.get("history"))
    row = {**data, prompt: [*history, {"role": "user", "content": text}] if history else text}
    if rows == "single" and completions[0] not in data:
        if not isinstance(data[answer], str | list | tuple):
            raise wrong_type(answer, data[answer], "a text or a list of messages")
        row[completions[0]] = text_of(data[answer], answer) if isinstance(data[answer], str) else data[answer]
    return row


def _history(value: Any) -> list[dict[str, Any]]:
    """Earlier turns, as pairs of what was asked and what was answered."""
    pairs = parsed(value, "history") if isinstance(value, str) and value.strip() else value or []
    turns = []
    for i, pair in enumerate(pairs if isinstance(pairs, list | tuple) else [None]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused("wrong_type", f"history[{i}] is no pair", expected="a list of [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:") and ASSISTANT in value


def _transcripts(data: Mapping[str, Any], prompt: str, sides: Sequence[str], as_text: bool) -> Mapping[str, Any]:
    texts = [data[side] for side in sides]
    if as_text:
        parting = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        stop = texts[0].rfind(ASSISTANT, 0, parting) + len(ASSISTANT)
        if stop < len(ASSISTANT):
            raise RowRefused("prompt_mismatch", "the transcripts part before the first Assistant turn")
        return {**data, prompt: texts[0][:stop], **{s: t[stop:] for s, t in zip(sides, texts, strict=True)}}
    return {**data, **{side: _turns(text, side) for side, text in zip(sides, texts, strict=True)}}


def _turns(text: str, side: str) -> list[dict[str, Any]]:
    """The turns of a transcript; the white space around a turn is the transcript's."""
    first, *pieces = TURN.split("\n\n" + text.lstrip("\n"))
    assert not first
    turns = []
    for i, (who, words) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        if not words.strip():
            raise RowRefused("empty_field", f"{side}: turn {i + 1} of the transcript is blank", expected="a text")
        if (who == "Human") != (i % 2 == 0):
            raise RowRefused(
                "role_order",
                f"{side}: turn {i + 1} of the transcript is of {who} again",
                expected="Human and Assistant in turns",
            )
        turns.append({"role": "user" if who == "Human" else "assistant", "content": words.strip()})
    return turns


def _sharegpt(data: Mapping[str, Any], rows: RowShape, prompt: str, completions: Sequence[str]) -> Mapping[str, Any]:
    rest = _without(data, "conversations")
    found = data["conversations"]
    if found and all(isinstance(turn, Mapping) and "role" in turn and "from" not in turn for turn in found):
        turns = list(found)  # messages under sharegpt's name
    else:
        turns = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(found)]
    if rows == "single" and (prompt in rest or any(side not in rest for side in completions) or is_answered(turns)):
        return {**rest, "messages": turns}
    for side in completions:
        if isinstance(rest.get(side), Mapping):
            rest[side] = [rest[side]]
        if isinstance(rest.get(side), list | tuple):
            rest[side] = [
                _turn(turn, f"{side}[{i}]") if isinstance(turn, Mapping) and "from" in turn else turn
                for i, turn in enumerate(rest[side])
            ]
    return {**rest, prompt: turns}


def _turn(turn: Any, field: str) -> dict[str, Any]:
    """A turn as a message; its other keys (weight, reasoning, ...) stay what they are."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise RowRefused("wrong_type", f"{field} is no turn", expected="an object with from and value")
    who, words = turn["from"], turn["value"]
    role = SHAREGPT_ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise RowRefused(
            "unknown_role", f"{field}.from is {str(who)[:40]!r}", expected="one of " + ", ".join(SHAREGPT_ROLES)
        )
    more = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if who != "function_call":
        return {"role": role, "content": words, **more}
    calls = parsed(words, f"{field}.value")
    calls = calls if isinstance(calls, list) else [calls]
    made = [{"type": "function", "function": call} for call in calls]
    return {"role": role, "content": None, "tool_calls": made, **more}
