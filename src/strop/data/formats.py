"""Rows to examples: which shapes are known, and what is wrong with a row that has none of them. Floor 2.

In: one row as a mapping. Out: an Example, validated: every text is there, can be encoded and is not blank; roles are
known and in order; a pair's sides share their prompt and differ after it. `docs/data.md` shows each shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.config import DatasetSection
from strop.data.rows import RowRefused
from strop.data.shapes import own_shape
from strop.types import Example, Message, Origin, RowShape, Turns

ROLES = ("system", "developer", "user", "assistant", "tool")
MAY_BE_EMPTY = frozenset({"system", "developer", "tool"})
"""Roles whose content may be an empty text: a tool can have nothing to say."""

PAIR_METHODS = "post_training.method: dpo"
SINGLE_METHODS = "post_training.method: sft"


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of a row are called.

    keeps_transcripts: transcripts of hh-rlhf stay texts, for `dataset.render: raw`.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    keeps_transcripts: bool = False

    @classmethod
    def of(cls, dataset: DatasetSection) -> Columns:
        return cls(
            dataset.prompt_column,
            dataset.chosen_column,
            dataset.rejected_column,
            dataset.completion_column,
            keeps_transcripts=dataset.render == "raw",
        )

    def completions(self, rows: RowShape) -> tuple[str, ...]:
        return (self.chosen, self.rejected) if rows == "pair" else (self.completion,)


def to_example(data: Mapping[str, Any], origin: Origin, rows: RowShape, columns: Columns) -> Example:
    """The row as an example of the shape that the method needs.

    Raises:
        RowRefused: the row is not of that shape, or something in it cannot be trained on.
    """
    data = own_shape(
        data,
        rows,
        prompt=columns.prompt,
        completions=columns.completions(rows),
        keeps_transcripts=columns.keeps_transcripts,
    )
    if rows == "pair":
        prompt, completions = _pair(data, columns)
    else:
        prompt, completions = _single(data, columns)
    return Example(prompt, completions, origin, _tools(data))


def _single(data: Mapping[str, Any], columns: Columns) -> tuple[Turns, tuple[Turns, ...]]:
    if data.get("messages") is not None:
        return _conversation(data["messages"])
    if isinstance(data.get("label"), bool) and columns.completion in data:
        raise RowRefused(
            "wrong_shape",
            "the row has a true/false label: it is an unpaired preference row",
            expected="a conversation or a prompt with a completion to imitate",
            fix="keep the rows to imitate and remove the column label",
        )
    if columns.completion not in data and columns.chosen in data and columns.rejected in data:
        raise RowRefused(
            "wrong_shape",
            f"the row has {columns.chosen!r} and {columns.rejected!r}: it is a preference pair",
            expected=f"messages, or {columns.prompt} and {columns.completion}",
            fix=f"set {PAIR_METHODS}",
        )
    if "messages" in data and columns.completion not in data:
        raise _null("messages")
    if "text" in data and columns.prompt not in data and columns.completion not in data:
        return "", (_text(data["text"], "text"),)
    _require(data, (columns.prompt, columns.completion), f"messages, or {columns.prompt} and {columns.completion}")
    return _explicit(data, columns.prompt, (columns.completion,))


def _conversation(value: Any) -> tuple[Turns, tuple[Turns, ...]]:
    if not isinstance(value, list | tuple):
        raise _wrong_type("messages", value, "a list of messages")
    turns = _turns(value, "messages")
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), None)
    if first is None:
        raise RowRefused("role_order", "messages has no assistant turn", expected="at least one, to train on")
    return turns[:first], (turns[first:],)


def _pair(data: Mapping[str, Any], columns: Columns) -> tuple[Turns, tuple[Turns, ...]]:
    sides = (columns.chosen, columns.rejected)
    found = next((key for key in ("messages", "completion", "text", "input_ids") if key in data), None)
    if found is not None and not any(side in data for side in sides):
        raise RowRefused(
            "wrong_shape",
            f"the row has {found!r} and no {columns.chosen!r} and {columns.rejected!r}: it has nothing to compare",
            expected=f"{columns.prompt}, {columns.chosen} and {columns.rejected}",
            fix=f"set {SINGLE_METHODS}",
        )
    _require(data, sides, f"{columns.prompt}, {columns.chosen} and {columns.rejected}")
    _same_kind(data, sides)
    # a configured name says that there is such a column; without one the prompt may stand inside both sides
    if columns.prompt in data or columns.prompt != "prompt":
        _require(data, (columns.prompt,), f"{columns.prompt}, {columns.chosen} and {columns.rejected}")
        prompt, completions = _explicit(data, columns.prompt, sides)
    else:
        prompt, completions = _implicit(data, sides, columns.prompt)
    if completions[0] == completions[1]:
        raise _equal(sides)
    return prompt, completions


def _require(data: Mapping[str, Any], fields: tuple[str, ...], expected: str) -> None:
    for field in fields:
        if field not in data:
            names = ", ".join(repr(str(key)[:40]) for key in list(data)[:8]) or "none"
            raise RowRefused("missing_field", f"{field!r} is missing; the row has {names}", expected=expected)
        if data[field] is None:
            raise _null(field)


def _same_kind(data: Mapping[str, Any], sides: tuple[str, str]) -> None:
    for side in sides:
        if not isinstance(data[side], str | list | tuple):
            raise _wrong_type(side, data[side], "a text or a list of messages")
    if isinstance(data[sides[0]], str) != isinstance(data[sides[1]], str):
        kinds = " and ".join(f"{side} is {_kind(data[side])}" for side in sides)
        raise RowRefused("mixed_types", kinds, expected="both a text, or both a list of messages")


def _explicit(data: Mapping[str, Any], prompt_field: str, sides: tuple[str, ...]) -> tuple[Turns, tuple[Turns, ...]]:
    """A prompt in a column of its own. Completions that repeat it have it cut off."""
    value = data[prompt_field]
    if isinstance(value, str) and all(isinstance(data[side], str) for side in sides):
        return _text(value, prompt_field), tuple(_text(data[side], side) for side in sides)
    completions = [_answer(data[side], side) for side in sides]
    prompt: tuple[Message, ...]
    if isinstance(value, str):
        prompt = ({"role": "user", "content": _text(value, prompt_field)},)
        if len(sides) == 2 and all(turns[0]["role"] != "assistant" for turns in completions):
            return _repeated(prompt, completions, sides, prompt_field)
    elif isinstance(value, list | tuple):
        prompt = _turns(value, prompt_field)
    else:
        raise _wrong_type(prompt_field, value, "a text or a list of messages")
    _check_prompt(prompt, prompt_field)
    return prompt, tuple(_after(prompt, turns, side) for turns, side in zip(completions, sides, strict=True))


def _answer(value: Any, field: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": _text(value, field)},)
    if not isinstance(value, list | tuple):
        raise _wrong_type(field, value, "a text or a list of messages")
    return _turns(value, field)


def _repeated(
    prompt: tuple[Message, ...], completions: list[tuple[Message, ...]], sides: tuple[str, ...], field: str
) -> tuple[Turns, tuple[Turns, ...]]:
    """A prompt as text, and both sides as whole conversations: the prompt must be the last thing the user says."""
    shared, rests = _split(completions[0], completions[1], sides)
    if shared[-1]["content"].strip() != prompt[0]["content"].strip():
        raise RowRefused(
            "prompt_mismatch",
            f"the conversations do not lead up to {field!r}",
            expected=f"the text of {field!r} as the last user turn before the sides differ",
        )
    return shared, rests


def _after(prompt: tuple[Message, ...], turns: tuple[Message, ...], side: str) -> tuple[Message, ...]:
    """What `turns` adds to the prompt."""
    if len(turns) > len(prompt) and turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    role = turns[0]["role"]
    if role == "assistant":
        return turns
    if len(turns) > 1:
        raise RowRefused(
            "prompt_mismatch",
            f"{side} is a conversation that does not begin with the prompt",
            expected="the assistant's answer to the prompt, or the prompt and the answer",
        )
    raise RowRefused("role_order", f"{side} is a {role} turn", expected="an assistant turn")


def _implicit(data: Mapping[str, Any], sides: tuple[str, str], field: str) -> tuple[Turns, tuple[Turns, ...]]:
    """No prompt column: the prompt is what both conversations begin with."""
    if isinstance(data[sides[0]], str):
        raise RowRefused(
            "missing_field",
            f"{field!r} is missing and {sides[0]} and {sides[1]} are texts",
            expected=f"a column {field!r}, or both sides as conversations that begin with the prompt",
            fix="set dataset.prompt_column if the column has another name",
        )
    chosen, rejected = (_turns(data[side], side) for side in sides)
    return _split(chosen, rejected, sides)


def _split(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], sides: tuple[str, ...]
) -> tuple[tuple[Message, ...], tuple[Turns, ...]]:
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if chosen == rejected:
        raise _equal(sides)
    rests = chosen[n:], rejected[n:]
    if n == 0 and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise RowRefused(
            "missing_field",
            f"there is no prompt, and {sides[0]} and {sides[1]} hold the answers alone",
            expected="a prompt column, or both sides as conversations that begin with the prompt",
        )
    if any(not rest or rest[0]["role"] != "assistant" for rest in rests):
        raise RowRefused(
            "prompt_mismatch",
            f"{sides[0]} and {sides[1]} part at turn {n + 1}, which is not an assistant turn in both",
            expected="the same conversation up to an assistant turn",
        )
    _check_prompt(chosen[:n], f"the prompt shared by {sides[0]} and {sides[1]}")
    return chosen[:n], rests


def _check_prompt(prompt: tuple[Message, ...], field: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise RowRefused(
            "role_order", f"{field} ends with an assistant turn", expected="a turn that asks for an answer"
        )


def _turns(value: list[Any] | tuple[Any, ...], field: str) -> tuple[Message, ...]:
    if not value:
        raise RowRefused("empty_field", f"{field} is an empty list", expected="at least one message")
    turns = tuple(_message(message, f"{field}[{i}]") for i, message in enumerate(value))
    for i, turn in enumerate(turns):
        if turn["role"] in ("system", "developer") and i > 0:
            raise RowRefused(
                "system_not_first", f"{field}[{i}] is a {turn['role']} turn", expected="it as the first turn, or none"
            )
    return turns


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise _wrong_type(field, message, "a message, an object with role and content")
    if "role" not in message:
        reason = "sharegpt_keys" if "from" in message else "missing_field"
        found = "has from/value in place of role/content" if "from" in message else "has no role"
        raise RowRefused(reason, f"{field} {found}", expected="an object with role and content")
    role = message["role"]
    if not isinstance(role, str):
        raise _wrong_type(f"{field}.role", role, "a text")
    if role not in ROLES:
        raise RowRefused("unknown_role", f"{field}.role is {role[:40]!r}", expected="one of " + ", ".join(ROLES))
    # a missing key and a null are the same to templates of current models; tables fill missing keys with null
    turn = {key: item for key, item in message.items() if item is not None}
    if not turn.get("tool_calls"):
        turn.pop("tool_calls", None)
    elif not isinstance(turn["tool_calls"], list | tuple) or not all(
        isinstance(c, Mapping) for c in turn["tool_calls"]
    ):
        raise _wrong_type(f"{field}.tool_calls", turn["tool_calls"], "a list of objects")
    else:
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    calls = role == "assistant" and "tool_calls" in turn
    if "content" in turn:
        turn["content"] = _content(turn["content"], f"{field}.content", may_be_empty=calls or role in MAY_BE_EMPTY)
    elif not calls:
        if "content" in message:
            raise _null(f"{field}.content")
        raise RowRefused("missing_field", f"{field} has no content", expected="an object with role and content")
    return turn


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call with its arguments as an object: templates write them as JSON, which would quote a text once more."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _content(value: Any, field: str, *, may_be_empty: bool) -> str:
    if isinstance(value, list | tuple):
        value = "".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))
    return _text(value, field, may_be_empty=may_be_empty)


def _part(part: Any, field: str) -> str:
    if not isinstance(part, Mapping):
        raise _wrong_type(field, part, 'an object {"type": "text", "text": ...}')
    if part.get("type") != "text":
        kind = str(part.get("type"))[:40]
        raise RowRefused("unsupported_modality", f"{field} is of type {kind!r}", expected="parts of type text")
    if not isinstance(part.get("text"), str):
        raise _wrong_type(f"{field}.text", part.get("text"), "a text")
    return str(part["text"])


def _text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _wrong_type(field, value, "a text")
    if not may_be_empty and not value.strip():
        found = "is empty" if not value else f"is only white space ({value[:20]!r})"
        raise RowRefused("empty_field", f"{field} {found}", expected="a text")
    if "\0" in value:
        raise RowRefused("nul_character", f"{field} holds a NUL at character {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused(
            "lone_surrogate",
            f"{field} holds half a surrogate pair, {value[error.start]!r}, at character {error.start}",
            expected="text that can be written as UTF-8",
        ) from error
    return value


def _tools(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    tools = data.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _wrong_type("tools", tools, "a list of objects, one a tool")
    return tuple(tools)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return str(value)[:40]
        case str():
            return f"a text ({value[:40]!r})"
        case Mapping():
            return "an object"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            return f"a {type(value).__name__}"


def _wrong_type(field: str, value: Any, expected: str) -> RowRefused:
    return RowRefused("wrong_type", f"{field} is {_kind(value)}", expected=expected)


def _null(field: str) -> RowRefused:
    return RowRefused("null_field", f"{field} is null", expected="a text or a list of messages")


def _equal(sides: tuple[str, ...]) -> RowRefused:
    return RowRefused(
        "chosen_equals_rejected", f"{sides[0]} and {sides[1]} are the same", expected="two answers that differ"
    )
