"""Rows to examples: which shapes are known, and what is wrong with a row that has none of them. Floor 2.

In: one row as a mapping. Out: an Example, validated: every text is there, can be encoded and is not blank; roles are
known and in order; a pair's sides share their prompt and differ after it. `docs/data.md` shows each shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.config import DatasetSection
from strop.data.messages import in_words, is_null, text_of, turns_of, wrong_type
from strop.data.rows import RowRefused
from strop.data.shapes import own_shape
from strop.types import Example, Message, Origin, RowShape, Turns

PAIR_METHODS = "post_training.method: dpo"
LABELLED_METHODS = "post_training.method: kto"
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
    kind: RowShape = "single" if rows == "single" or (rows == "labelled" and "label" in data) else "pair"
    data = own_shape(
        data,
        kind,
        prompt=columns.prompt,
        completions=columns.completions(kind),
        keeps_transcripts=columns.keeps_transcripts,
    )
    label = None
    if rows == "labelled" and not (columns.chosen in data and columns.rejected in data):
        prompt, completions, label = _labelled(data, columns)
    elif rows == "single":
        prompt, completions = _single(data, columns)
    else:
        prompt, completions = _pair(data, columns)
    return Example(prompt, completions, origin, _tools(data), label)


def _labelled(data: Mapping[str, Any], columns: Columns) -> tuple[Turns, tuple[Turns, ...], bool]:
    pair = f"{columns.prompt}, {columns.chosen} and {columns.rejected}"
    expected = f"{columns.prompt}, {columns.completion} and label, or {pair}"
    if "messages" in data and columns.completion not in data:
        raise RowRefused(
            "wrong_shape",
            "the row has 'messages' and no 'completion' and 'label': nothing says whether it is desirable",
            expected=expected,
            fix=f"set {SINGLE_METHODS}",
        )
    _require(data, (columns.prompt, columns.completion, "label"), expected)
    label = {"true": True, "false": False}.get(str(data["label"]).lower())  # a CSV file has texts only
    if label is None:
        raise wrong_type("label", data["label"], "true (desirable) or false")
    prompt, completions = _explicit(data, columns.prompt, (columns.completion,))
    return prompt, completions, label


def _single(data: Mapping[str, Any], columns: Columns) -> tuple[Turns, tuple[Turns, ...]]:
    if data.get("messages") is not None:
        return _conversation(data["messages"])
    if isinstance(data.get("label"), bool) and columns.completion in data:
        raise RowRefused(
            "wrong_shape",
            "the row has a true/false label: it is an unpaired preference row",
            expected="a conversation or a prompt with a completion to imitate",
            fix=f"set {LABELLED_METHODS}, or keep the rows to imitate and remove the column label",
        )
    if columns.completion not in data and columns.chosen in data and columns.rejected in data:
        raise RowRefused(
            "wrong_shape",
            f"the row has {columns.chosen!r} and {columns.rejected!r}: it is a preference pair",
            expected=f"messages, or {columns.prompt} and {columns.completion}",
            fix=f"set {PAIR_METHODS}",
        )
    if "messages" in data and columns.completion not in data:
        raise is_null("messages")
    if "text" in data and columns.prompt not in data and columns.completion not in data:
        return "", (text_of(data["text"], "text"),)
    _require(data, (columns.prompt, columns.completion), f"messages, or {columns.prompt} and {columns.completion}")
    return _explicit(data, columns.prompt, (columns.completion,))


def _conversation(value: Any) -> tuple[Turns, tuple[Turns, ...]]:
    if not isinstance(value, list | tuple):
        raise wrong_type("messages", value, "a list of messages")
    turns = turns_of(value, "messages")
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
            fix=f"set {LABELLED_METHODS if 'label' in data else SINGLE_METHODS}",
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
            raise is_null(field)


def _same_kind(data: Mapping[str, Any], sides: tuple[str, str]) -> None:
    for side in sides:
        if not isinstance(data[side], str | list | tuple):
            raise wrong_type(side, data[side], "a text or a list of messages")
    if isinstance(data[sides[0]], str) != isinstance(data[sides[1]], str):
        kinds = " and ".join(f"{side} is {in_words(data[side])}" for side in sides)
        raise RowRefused("mixed_types", kinds, expected="both a text, or both a list of messages")


def _explicit(data: Mapping[str, Any], prompt_field: str, sides: tuple[str, ...]) -> tuple[Turns, tuple[Turns, ...]]:
    """A prompt in a column of its own. Completions that repeat it have it cut off."""
    value = data[prompt_field]
    if isinstance(value, str) and all(isinstance(data[side], str) for side in sides):
        return text_of(value, prompt_field), tuple(text_of(data[side], side) for side in sides)
    completions = [_answer(data[side], side) for side in sides]
    prompt: tuple[Message, ...]
    if isinstance(value, str):
        prompt = ({"role": "user", "content": text_of(value, prompt_field)},)
        if len(sides) == 2 and all(turns[0]["role"] != "assistant" for turns in completions):
            return _repeated(prompt, completions, sides, prompt_field)
    elif isinstance(value, list | tuple):
        prompt = turns_of(value, prompt_field)
    else:
        raise wrong_type(prompt_field, value, "a text or a list of messages")
    _check_prompt(prompt, prompt_field)
    return prompt, tuple(_after(prompt, turns, side) for turns, side in zip(completions, sides, strict=True))


def _answer(value: Any, field: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": text_of(value, field)},)
    if not isinstance(value, list | tuple):
        raise wrong_type(field, value, "a text or a list of messages")
    return turns_of(value, field)


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
    chosen, rejected = (turns_of(data[side], side) for side in sides)
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


def _tools(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    tools = data.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise wrong_type("tools", tools, "a list of objects, one a tool")
    return tuple(tools)


def _equal(sides: tuple[str, ...]) -> RowRefused:
    return RowRefused(
        "chosen_equals_rejected", f"{sides[0]} and {sides[1]} are the same", expected="two answers that differ"
    )
