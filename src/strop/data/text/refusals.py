"""Refusals of rows of which a template leaves something out, or in whose rendering no answer can be located. Floor 2.

In: what was found. Out: the refusal, which says what is left out and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.text.markers import MarkedText
from strop.data.text.message_forms import Tools
from strop.data.text.template_writer import Writer
from strop.types import Message

PARTS_OF_A_TURN = {
    "name": "write names into the contents, remove the key, or set dataset.template to one that has it",
    "channel": "write an analysis under reasoning_content of the answer that follows it, and remove the key",
    "recipient": "write calls as tool_calls, and remove the key",
    "tools": "put them into the column tools of the row",
    "functions": "put them into the column tools of the row",
}
"""Keys of a message that are refused where the template leaves them out, and what to do."""

FINAL = ("channel", "final")
"""A key and value that need not be rendered: an answer is final without them."""


def refuse_lost_parts(messages: Sequence[Message], unread: Sequence[tuple[int, str]]) -> None:
    """Refuses a row of which the template leaves out a key that says who speaks, or to whom, or with which tools.

    Args:
        unread: keys that the template does not read, each with the number of its message.
    """
    for i, key in unread:
        value, role = messages[i][key], messages[i]["role"]
        if key in PARTS_OF_A_TURN and (key, value) != FINAL and (key, role) != ("name", "tool"):
            raise RowRefused(
                "dropped_by_template",
                f"the chat template leaves the {key} {str(value)[:40]!r} of turn {i + 1} out",
                expected=f"a chat template that writes it, or turns without the key {key}",
                fix=PARTS_OF_A_TURN[key],
            )


def dropped(messages: Sequence[Message], piece: MarkedText) -> RowRefused:
    """The refusal of a row of which the template leaves a turn or a call out."""
    number, role = piece.message + 1, messages[piece.message]["role"]
    if piece.kind == "call":
        return RowRefused(
            "dropped_by_template",
            f"the chat template leaves a call of {piece.text[:40]!r} in turn {number} out",
            expected="a chat template that renders every call of a turn, or rows with one call per turn",
        )
    return RowRefused(
        "dropped_by_template",
        f"the chat template leaves turn {number} ({role}) out",
        expected=f"a chat template that renders {role} turns, or rows without them",
    )


def dropped_arguments() -> RowRefused:
    return RowRefused(
        "dropped_by_template",
        "the chat template leaves the arguments of tool calls out",
        expected="a chat template that writes calls with their arguments",
        fix="set dataset.template: qwen2.5_instruct, or to a template of your own that writes them",
    )


def dropped_tools(found: str) -> RowRefused:
    return RowRefused(
        "dropped_by_template",
        found,
        expected="a chat template that writes tools, or rows without them",
        fix="set dataset.template: qwen2.5_instruct, or to a template of your own that writes tools",
    )


def refuse_dropped_calls(messages: Sequence[Message], tools: Tools, text: str) -> None:
    """Tool calls and tools are not marked (templates serialise them), but their names have to be there."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    for kind, items in (("a tool call", calls), ("a tool", tools or ())):
        for item in items:
            function = item.get("function", item)
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(name, str) and name not in text:
                raise RowRefused(
                    "dropped_by_template",
                    f"the chat template leaves {kind}, {name[:40]!r}, out",
                    expected="a chat template that knows tools, or rows without them",
                )


def refuse_dropped_tools(writer: Writer, messages: Sequence[Message], text: str) -> None:
    """The name of a tool is in the text of its calls, too: where no description is there, a rendering without the tools
    says whether they are."""
    if not writer.tools or any(_is_described(tool, text) for tool in writer.tools):
        return
    try:
        if writer.without_tools().text(messages) != text:
            return
    except RowRefused:
        return
    raise dropped_tools("the chat template leaves the tools of the row out")


def _is_described(tool: Mapping[str, Any], text: str) -> bool:
    function = tool.get("function", tool)
    words = function.get("description") if isinstance(function, Mapping) else None
    return isinstance(words, str) and bool(words) and (words in text or json.dumps(words)[1:-1] in text)


class LostReasoning(RowRefused):
    """A row of which the template leaves the reasoning of turn `turn` out."""

    def __init__(self, turn: int, expected: str) -> None:
        super().__init__(
            "dropped_by_template",
            f"the chat template leaves the reasoning of turn {turn + 1} out",
            expected=expected,
            fix="set dataset.template to one that renders it, or dataset.on_dropped_reasoning: drop to train without "
            "it",
        )
        self.turn = turn


def dropped_reasoning(i: int, opening: str | None) -> LostReasoning:
    """The refusal of a row whose reasoning in turn `i` the template leaves out. opening: its generation prompt."""
    asks_for_thoughts = opening is not None and opening.rstrip().endswith("<think>")
    begins = f"what the generation prompt ends with ({opening[-20:]!r})" if opening is not None else ""
    other = f", or a content that begins with {begins}" if asks_for_thoughts else ""
    return LostReasoning(i, "a chat template that renders reasoning" + other)


def refuse_lone_surrogates(text: str) -> None:
    """Refuses a rendering that no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused(
            "lone_surrogate",
            "the rendered conversation holds half a surrogate pair",
            expected="text that can be written as UTF-8",
        ) from error


def unverified(problem: str) -> RowRefused:
    """The refusal of a row whose answers cannot be located in its rendering."""
    return RowRefused(
        "spans_not_found",
        f"where the answers lie in the rendering cannot be told: {problem}",
        expected="a chat template with {% generation %} blocks, or one that renders every turn as it is",
    )
