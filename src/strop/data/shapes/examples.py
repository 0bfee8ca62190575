"""Rows to examples: which shapes are known, and what is wrong with a row that has none of them. Floor 2.

In: one row as a mapping. Out: an Example, validated: every text is there, can be encoded and is not blank; roles are
known and in order; a pair's sides share their prompt and differ after it; a completion ends with an assistant turn.
`docs/data.md` shows each shape. `prompt_and_completions` takes a prompt and its completions apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from strop.config import DatasetSection
from strop.data.read.row import RowRefused
from strop.data.shapes.extra_columns import (
    TEMPLATE_KWARGS,
    note_media,
    note_reasoning,
    template_kwargs_of,
    tools_of,
    with_system,
)
from strop.data.shapes.foreign import ANSWERS, BETTER_AND_WORSE, QUESTIONS, is_answered, own_shape
from strop.data.shapes.json_columns import messages_in, parsed
from strop.data.shapes.messages import as_context, is_null, is_trained, text_of, turns_of, wrong_type
from strop.data.shapes.number_columns import Numbers, numbers_of
from strop.data.shapes.prompt_and_completions import equal, explicit, implicit, same_kind
from strop.types import Example, Message, Origin, RowShape, Turns

FOR_PAIRS = "post_training.method: dpo"
FOR_LABELLED = "post_training.method: kto"
FOR_SINGLE = "post_training.method: sft"

JSON = ("tools", TEMPLATE_KWARGS)
"""Columns that may stand as JSON text."""

LABEL = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""What a label says, by its text."""

LABELS = "true or 1 (desirable), false or 0"
"""What a label should be, for messages to people."""

TURNS = "a text or a list of messages"
"""What a column of turns should be."""

KTO_TAG = "kto_tag"
"""Column that can only say whether an answer is desirable, whatever `dataset.label_column` names."""

STAND_IN = "."
"""The answer of a row that needs none: its prompt is then written as that of every other row. It is never trained."""

GROUP = "completions"
"""Column with the list of completions of a group."""

NAMED = ("prompt", "chosen", "rejected", "completion", "label")
"""Columns that may have other names: `dataset.prompt_column` and so on."""


@dataclass(frozen=True)
class RowColumns:
    """What the columns of a row are called, and what is done with rows that can be read in two ways.

    keeps_transcripts: transcripts of hh-rlhf stay texts, for `dataset.render: raw`. drops_trailing: turns behind the
    last assistant turn are left out; else such rows are refused. numbers: names of the columns of numbers to read.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    keeps_transcripts: bool = False
    drops_trailing: bool = False
    numbers: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: DatasetSection) -> RowColumns:
        return cls(
            dataset.prompt_column,
            dataset.chosen_column,
            dataset.rejected_column,
            dataset.completion_column,
            dataset.label_column,
            keeps_transcripts=dataset.render == "raw",
            drops_trailing=dataset.on_trailing_user == "drop",
        )

    @cached_property
    def named(self) -> frozenset[str]:
        """The columns that are read under these names."""
        return frozenset(getattr(self, kind) for kind in NAMED)

    @cached_property
    def of_messages(self) -> frozenset[str]:
        """The columns that may hold messages as JSON text."""
        sides = (self.chosen, self.rejected, self.completion, *ANSWERS, *BETTER_AND_WORSE)
        return frozenset(("messages", "conversations", self.prompt, *QUESTIONS, *sides))

    def completions(self, rows: RowShape) -> tuple[str, ...]:
        return (self.chosen, self.rejected) if rows == "pair" else (self.completion,)


def to_example(data: Mapping[str, Any], origin: Origin, rows: RowShape, columns: RowColumns) -> Example:
    """The row as an example of the shape that the method needs.

    Raises:
        RowRefused: the row is not of that shape, or something in it cannot be trained on.
    """
    reader = _Reader(data, rows, columns)
    prompt, completions, label = reader.parts()
    named = columns.named
    prompt, completions = with_system(data, named, prompt, completions, reader.notes)
    note_media(data, (prompt, *completions), reader.notes)
    note_reasoning(data, named, reader.notes)
    if isinstance(prompt, tuple):
        prompt = as_context(prompt)
    tools, kwargs, notes = tools_of(reader.data), template_kwargs_of(reader.data), tuple(reader.notes)
    return Example(prompt, completions, origin, tools, label, notes, kwargs, reader.numbers(len(completions)))


class _Reader:
    """Reads one row.

    data: the row in a shape of strop's own, without its nulls: a table fills columns that a row does not have.
    nulls: columns that are null. notes: what was done to it, by the names of `COUNTERS`.
    """

    def __init__(self, data: Mapping[str, Any], rows: RowShape, columns: RowColumns) -> None:
        self._columns, self._rows, self._whole = columns, rows, data
        self.notes: list[str] = []
        self._nulls = frozenset(key for key, value in data.items() if value is None)
        given = {key: value for key, value in data.items() if value is not None} if self._nulls else dict(data)
        self._read_json(given)
        if rows == "group":
            self.data: Mapping[str, Any] = given
            return
        is_pair = columns.chosen in given and columns.rejected in given
        has_label = rows == "labelled" and columns.label in given and not is_pair
        kind: RowShape = "single" if rows in ("single", "prompt") or has_label else "pair"
        if rows == "prompt":  # an answer is there for rewards alone, which take numbers, too
            answers = (columns.completion, *ANSWERS)
            given = {k: v for k, v in given.items() if k not in answers or not isinstance(v, int | float)}
        self.data = self._own_shape(given, kind)
        if rows == "prompt" and not self._has_answer():
            self.data = self._own_shape({**given, columns.completion: STAND_IN}, kind)

    def _own_shape(self, given: Mapping[str, Any], kind: RowShape) -> Mapping[str, Any]:
        columns = self._columns
        return own_shape(
            given,
            kind,
            prompt=columns.prompt,
            completions=columns.completions(kind),
            keeps_transcripts=columns.keeps_transcripts,
        )

    def _has_answer(self) -> bool:
        return self._columns.completion in self.data or ("messages" in self.data and is_answered(self.data["messages"]))

    def _read_json(self, row: dict[str, Any]) -> None:
        """Messages and tools that stand as JSON text, in place of the text."""
        columns = self._columns
        for name in [name for name, value in row.items() if isinstance(value, str)]:
            if name in columns.of_messages and (turns := messages_in(row[name], name)) is not None:
                row[name] = turns
                self.notes[:] = ["messages_as_json"]
            elif name in (*JSON, "messages", "conversations", columns.label) and not row[name].strip():
                del row[name]  # a CSV file has no other nulls
                self._nulls |= {name}
            elif name in JSON or (name == GROUP and self._rows == "group"):
                row[name] = parsed(row[name], name)
        answers = row.get(GROUP) if self._rows == "group" else None
        if isinstance(answers, list | tuple):
            row[GROUP] = [self._answer_of_group(answer, f"{GROUP}[{i}]") for i, answer in enumerate(answers)]

    def _answer_of_group(self, answer: Any, field: str) -> Any:
        turns = messages_in(answer, field) if isinstance(answer, str) else None
        if turns is None:
            return answer
        self.notes[:] = ["messages_as_json"]
        return turns

    def parts(self) -> tuple[Turns, tuple[Turns, ...], bool | None]:
        """Prompt, completions and label."""
        columns, label = self._columns, None
        if self._rows == "labelled" and not (columns.chosen in self.data and columns.rejected in self.data):
            prompt, completions, label = self._labelled()
        elif self._rows in ("single", "prompt"):
            prompt, completions = self._single()
        elif self._rows == "group":
            prompt, completions = self._group()
        else:
            prompt, completions = self._pair()
        completions = tuple(self._finished(completion) for completion in completions)
        if self._rows != "group" and len(completions) == 2 and completions[0] == completions[1]:
            raise equal((columns.chosen, columns.rejected))
        return prompt, completions, label

    def _labelled(self) -> tuple[Turns, tuple[Turns, ...], bool]:
        columns, data = self._columns, self.data
        pair = f"{columns.prompt}, {columns.chosen} and {columns.rejected}"
        expected = f"{columns.prompt} or messages, {columns.completion} and {columns.label}; or {pair}"
        talk = "messages" in data and columns.completion not in data
        if talk and columns.label not in data and columns.label not in self._nulls:
            raise RowRefused(
                "wrong_shape",
                f"the row has 'messages' and no {columns.label!r}: nothing says whether it is desirable",
                expected=expected,
                fix=f"name the column with the label (--label-column); set {FOR_SINGLE} only if every answer of "
                "the file is one to imitate",
            )
        self._require((columns.label,) if talk else (columns.prompt, columns.completion, columns.label), expected)
        label = _label(data[columns.label])
        if label is None:
            raise wrong_type(columns.label, data[columns.label], LABELS)
        if talk:
            turns = self._ended(self._conversation(), "messages")
            return turns[:-1], (turns[-1:],), label
        prompt, completions = explicit(data, columns.prompt, (columns.completion,))
        return prompt, completions, label

    def _single(self) -> tuple[Turns, tuple[Turns, ...]]:
        columns, data = self._columns, self.data
        expected = f"messages, or {columns.prompt} and {columns.completion}"
        if self._rows == "single" and (columns.completion in data or "messages" in data):
            self._refuse_label()
        if "messages" in data:
            turns = self._conversation()
            first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
            return turns[:first], (turns[first:],)
        if columns.completion not in data and columns.chosen in data and columns.rejected in data:
            raise RowRefused(
                "wrong_shape",
                f"the row has {columns.chosen!r} and {columns.rejected!r}: it is a preference pair",
                expected=expected,
                fix=f"set {FOR_PAIRS}",
            )
        if "messages" in self._nulls and columns.completion not in data:
            raise is_null("messages", TURNS)
        if "text" in data and columns.prompt not in data and columns.completion not in data:
            return "", (text_of(data["text"], "text"),)
        self._require((columns.prompt, columns.completion), expected)
        return explicit(data, columns.prompt, (columns.completion,))

    def _refuse_label(self) -> None:
        """Rows of answers that are to be imitated and of others: half of them nobody should imitate."""
        for name in (self._columns.label, KTO_TAG):
            if _label(self.data.get(name)) is not None:
                raise RowRefused(
                    "wrong_shape",
                    f"the row has a true/false {name}: it is an unpaired preference row",
                    expected="a conversation or a prompt with a completion to imitate",
                    fix=f"set {FOR_LABELLED}, or keep the rows to imitate and remove the column {name} (or rename "
                    "it, if it says something else)",
                )

    def _group(self) -> tuple[Turns, tuple[Turns, ...]]:
        """A prompt with any number of completions, which need not differ."""
        prompt = self._columns.prompt
        expected = f"{prompt} and {GROUP}, a list of answers to it"
        self._require((prompt,), expected)
        if GROUP in self._nulls:
            raise is_null(GROUP, expected)
        if GROUP not in self.data:
            raise RowRefused(
                "missing_field",
                f"{GROUP!r} is missing",
                expected=expected,
                fix=f"put the answers into a list {GROUP!r}",
            )
        answers = self.data[GROUP]
        if not isinstance(answers, list | tuple) or not answers:
            raise wrong_type(GROUP, answers, "a list with at least one answer, each a text or a list of messages")
        named = {f"{GROUP}[{i}]": answer for i, answer in enumerate(answers)}
        return explicit({**named, prompt: self.data[prompt]}, prompt, tuple(named))

    def _conversation(self) -> tuple[Message, ...]:
        """The turns of `messages`, an assistant's among them."""
        value = self.data["messages"]
        if not isinstance(value, list | tuple):
            raise wrong_type("messages", value, "a list of messages")
        turns = turns_of(value, "messages")
        if all(turn["role"] != "assistant" for turn in turns):
            raise RowRefused("role_order", "messages has no assistant turn", expected="at least one, to train on")
        return turns

    def _pair(self) -> tuple[Turns, tuple[Turns, ...]]:
        columns, data = self._columns, self.data
        sides = (columns.chosen, columns.rejected)
        expected = f"{columns.prompt}, {columns.chosen} and {columns.rejected}"
        found = next((key for key in ("messages", "completion", "text", "input_ids") if key in data), None)
        if found is not None and not any(side in data for side in sides):
            raise RowRefused(
                "wrong_shape",
                f"the row has {found!r} and no {columns.chosen!r} and {columns.rejected!r}: it has nothing to compare",
                expected=expected,
                fix=f"set {FOR_LABELLED if columns.label in data else FOR_SINGLE}",
            )
        self._require(sides, expected)
        same_kind(data, sides)
        # a configured name says that there is such a column; without one the prompt may stand inside both sides
        if columns.prompt in data or columns.prompt in self._nulls or columns.prompt != "prompt":
            self._require((columns.prompt,), expected)
            return explicit(data, columns.prompt, sides)
        return implicit(data, sides, columns.prompt)

    def _require(self, fields: tuple[str, ...], expected: str) -> None:
        for field in fields:
            if field in self.data:
                continue
            if field in self._nulls:
                raise is_null(field, LABELS if field == self._columns.label else TURNS)
            names = ", ".join(repr(str(key)[:40]) for key in list(self._whole)[:12]) or "none"
            kinds = {getattr(self._columns, kind): kind for kind in NAMED}
            missing = [kinds[name] for name in fields if name not in self.data]
            flags = ", ".join(f"--{kind}-column NAME" for kind in missing)
            keys = ", ".join(f"dataset.{kind}_column" for kind in missing)
            raise RowRefused(
                "missing_field",
                f"{field!r} is missing; the row has {names}",
                expected=expected,
                fix=f"if it has another name, say which: {flags} ({keys}); else fix the row, or set "
                "dataset.on_error: skip to leave such rows out and count them",
            )

    def _finished(self, completion: Turns) -> Turns:
        if isinstance(completion, str):
            return completion
        turns = self._ended(completion, "the conversation")
        if not any(is_trained(turn) for turn in turns if turn["role"] == "assistant"):
            raise RowRefused(
                "nothing_labelled",
                "the row says of every assistant turn that it is not to be trained",
                expected="at least one to train on",
            )
        return turns

    def _ended(self, turns: tuple[Message, ...], field: str) -> tuple[Message, ...]:
        """The turns up to the last assistant turn."""
        stop = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant") + 1
        if stop == len(turns):
            return turns
        if not self._columns.drops_trailing:
            raise RowRefused(
                "trailing_turn",
                f"{field} ends with a {turns[-1]['role']} turn, which nothing answers",
                expected="an assistant turn at the end",
                fix="fix the row, or set dataset.on_trailing_user: drop to train up to the last assistant turn",
            )
        self.notes += ["trailing_turns"] * (len(turns) - stop)
        return turns[:stop]

    def numbers(self, num_completions: int) -> Numbers:
        """The numbers beside its completions, in the columns that the method takes."""
        return numbers_of(self._whole, num_completions, self._columns.numbers)


def _label(value: Any) -> bool | None:
    """What a label says; None where it is none. A CSV file has texts only, and some tables have numbers."""
    return LABEL.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
