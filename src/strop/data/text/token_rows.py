"""Rows that are tokens already: {"input_ids", "labels"}, and groups {"prompt_ids", "completion_ids"}. Floor 2.

In: a row. Out: an Encoded, as from the encoder. Labels are the ids again, -100 where nothing is trained; they are not
shifted, as `transformers` wants them too. All tokens of a group's completions are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.shapes.messages import wrong_type
from strop.data.shapes.number_columns import numbers_of
from strop.data.text.encode import Encoded, EncodedSide

NOT_TRAINED = -100


def is_tokenised(data: Mapping[str, Any]) -> bool:
    """Whether the row holds tokens instead of texts."""
    return "input_ids" in data and data.get("messages") is None and "prompt" not in data


def is_tokenised_group(data: Mapping[str, Any]) -> bool:
    """Whether the row holds a prompt and its completions as tokens."""
    return "completion_ids" in data and "completions" not in data


def group_from_tokens(data: Mapping[str, Any], vocabulary: int, numbers: Sequence[str] = ()) -> Encoded:
    """A prompt and its completions.

    Args:
        vocabulary: ids lie below it. numbers: names of the columns of numbers that are read.

    Raises:
        RowRefused: ids or numbers are not what they should be.
    """
    if data.get("prompt_ids") is None:
        raise RowRefused("missing_field", "'prompt_ids' is missing beside 'completion_ids'", expected="both")
    prompt, listed = _ids(data["prompt_ids"], "prompt_ids", vocabulary), data["completion_ids"]
    if not isinstance(listed, list | tuple) or not listed:
        raise wrong_type("completion_ids", listed, "a list with at least one list of token ids")
    sides = [_ids(ids, f"completion_ids[{i}]", vocabulary) for i, ids in enumerate(listed)]
    found = numbers_of(data, len(sides), numbers)
    return Encoded(prompt, tuple(EncodedSide(ids, b"\1" * len(ids)) for ids in sides), numbers=found)


def from_tokens(data: Mapping[str, Any], vocabulary: int, numbers: Sequence[str] = ()) -> Encoded:
    """The tokens before the first trained one are the prompt, the others the completion.

    Args:
        vocabulary: ids lie below it. numbers: names of the columns of numbers that are read.

    Raises:
        RowRefused: ids or labels are not what they should be.
    """
    ids = _integers(data["input_ids"], "input_ids")
    if "labels" not in data:
        raise RowRefused(
            "missing_field",
            "'labels' is missing beside 'input_ids'",
            expected="labels: the ids again, -100 where a token is not trained",
        )
    labels = _integers(data["labels"], "labels")
    seen = [1] * len(ids) if data.get("attention_mask") is None else _integers(data["attention_mask"], "attention_mask")
    if not len(ids) == len(labels) == len(seen):
        raise RowRefused(
            "token_mismatch",
            f"there are {len(ids)} input_ids, {len(labels)} labels and {len(seen)} attention_mask values",
            expected="as many of each",
        )
    ids, labels = ([x for x, kept in zip(xs, seen, strict=True) if kept] for xs in (ids, labels))
    _check_known(ids, "input_ids", vocabulary)
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, NOT_TRAINED):
            raise RowRefused(
                "token_mismatch",
                f"labels[{i}] is {label}, and input_ids[{i}] is {token}",
                expected="the same id, or -100; labels are not shifted",
            )
    first = next((i for i, label in enumerate(labels) if label != NOT_TRAINED), None)
    first = max(first, 1) if first is not None else None  # nothing predicts the first token
    mask = bytes(label != NOT_TRAINED for label in labels[first:]) if first is not None else b""
    if first is None or 1 not in mask:
        raise RowRefused("nothing_labelled", "no label is a token to train", expected="at least one after the first")
    stop = first + mask.rfind(1) + 1
    side = EncodedSide(ids[first:stop], mask[: stop - first])
    return Encoded(ids[:first], (side,), numbers=numbers_of(data, 1, numbers))


def _ids(value: Any, field: str, vocabulary: int) -> list[int]:
    ids = _integers(value, field)
    _check_known(ids, field, vocabulary)
    return ids


def _check_known(ids: Sequence[int], field: str, vocabulary: int) -> None:
    for i, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise RowRefused(
                "unknown_token",
                f"{field}[{i}] is {token}",
                expected=f"ids of the model's tokenizer, from 0 to {vocabulary - 1}",
                fix="tokenise the rows with this model's tokenizer, or give texts",
            )


def _integers(value: Any, field: str) -> list[int]:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(numbers, Sequence) or not all(type(n) is int for n in numbers):
        raise RowRefused("wrong_type", f"{field} is no list of whole numbers", expected="a list of token ids")
    if not numbers:
        raise RowRefused("empty_field", f"{field} is an empty list", expected="some tokens")
    return list(numbers)
