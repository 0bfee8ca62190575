"""The numbers of a group beside its tokens: rewards and log-probs, cut as the tokens are cut. Floor 2.

In: an encoded row with its numbers, and the group that truncation has left of it. Out: the group with its numbers. At
the end, the check of all groups together.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from strop.config.method_base import Choice
from strop.data.read.row import RowRefused
from strop.data.store.table import Groups
from strop.data.text.encode import Encoded
from strop.errors import DataError
from strop.types import NUMBERS, OF_COMPLETIONS, OF_TOKENS, Group


def checked_numbers(encoded: Encoded) -> Encoded | RowRefused:
    """The row, or its refusal if it has not one number per trained token."""
    for name in OF_TOKENS:
        for i, (values, side) in enumerate(zip(encoded.numbers.get(name, ()), encoded.sides, strict=False)):
            if len(values) != (num_trained := side.mask.count(1)):
                return RowRefused(
                    "token_mismatch",
                    f"{name}[{i}] has {len(values)} numbers, and completion {i} has {num_trained} trained tokens",
                    expected="one log-prob per trained token, the end token included",
                    fix="give the rows as tokens (prompt_ids and completion_ids), as they were sampled, or leave out "
                    f"{name}",
                )
    return encoded


def with_numbers(group: Group, numbers: Mapping[str, tuple[Any, ...]]) -> Group:
    """The group with the numbers of its row, without those of tokens that were cut off."""
    found: dict[str, array[float]] = {}
    for name, values in numbers.items():
        if name in OF_TOKENS:
            left = (of_tokens[: c.num_scored] for of_tokens, c in zip(values, group.completions, strict=True))
            found[name] = array("d", chain.from_iterable(left))
        else:
            found[name] = array("d", values)
    return replace(group, numbers=found) if found else group


def unpaired(pair: Group) -> tuple[Group, Group]:
    """A pair as two labelled groups, each with its own numbers: chosen is desirable, rejected is not."""

    def side(i: int) -> Group:
        first = sum(c.num_scored for c in pair.completions[:i])
        own = slice(first, first + pair.completions[i].num_scored)
        numbers = {
            name: values[own] if name in OF_TOKENS else values[i : i + 1] if name in OF_COMPLETIONS else values
            for name, values in pair.numbers.items()
        }
        return replace(pair, completions=(pair.completions[i],), label=i == 0, numbers=numbers)

    return side(0), side(1)


def check_groups(groups: Groups | Sequence[Group], reads: frozenset[str], compares: Choice | None) -> None:
    """Refuse groups that lack what the objective reads, that have it in part, or that have nothing to compare.

    Args:
        reads: names of the columns that the objective needs. compares: what compares the completions of a group.

    Raises:
        DataError: names the first row.
    """
    if not isinstance(groups, Groups) or not len(groups):
        return  # an empty validation set
    _check_complete(groups, reads)
    if compares is None:
        return
    sizes = groups.counts("completions")
    if (sizes < 2).any():
        raise DataError(
            "the group has one completion, and there is nothing to compare it with",
            where=str(groups[int(sizes.argmin())].origin),
            expected=f"at least two completions per prompt (post_training.{compares.setting}: {compares.value})",
            fix=f"sample more completions per prompt, or set post_training.{compares.setting}: {compares.without}",
        )


def sampled_at(groups: Groups | Sequence[Group]) -> float | None:
    """The temperature that the rows say they were sampled at; None if they do not say.

    Raises:
        DataError: names the first row that was sampled at another one than the rows before.
    """
    if not isinstance(groups, Groups) or not len(groups):
        return None
    values = np.concatenate([some.ragged("sampling_temperature")[0] for some in groups.chunks()])
    if not len(values):
        return None
    if (others := values != values[0]).any():
        first = int(others.argmax())
        raise DataError(
            f"sampling_temperature is {values[first]:g}, and that of the rows before is {values[0]:g}",
            where=str(groups[first].origin),
            expected="one temperature for all rows, since log-probs are compared with those at it",
            fix="train on the rows of each temperature in a run of their own",
        )
    return float(values[0])


def _check_complete(groups: Groups, reads: frozenset[str]) -> None:
    """Refuse groups of which some have numbers that others lack, or all lack what the objective reads."""
    for name in NUMBERS:
        has = np.concatenate([some.counts(name) > 0 for some in groups.chunks()])
        if not has.all() and (name in reads or has.any()):
            row = groups[int(has.argmin())].origin
            raise DataError(
                f"the row has no {name}" + (f", and {int(has.sum())} of {len(has)} rows have it" if has.any() else ""),
                where=str(row),
                expected=f"{name} in every row" + ("" if name in reads else ", or in none"),
                fix=f"add {name}: {NUMBERS[name]}",
            )
