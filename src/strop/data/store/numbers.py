"""A row's numbers beside the tokens that are left of it. Floor 2.

In: an encoded row, the group that was cut from it, and the row's numbers. Out: the group with its numbers. And the
check of all groups, once they are there.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.store.table import NUMBERS, Groups
from strop.data.text.encode import Encoded
from strop.errors import DataError
from strop.types import OF_TOKENS, Group


def check_numbers(numbers: Mapping[str, tuple[Any, ...]], encoded: Encoded) -> RowRefused | None:
    """The refusal of a row whose numbers per token are not as many as the tokens that it came to."""
    for name in OF_TOKENS:
        for i, (values, side) in enumerate(zip(numbers.get(name, ()), encoded.sides, strict=False)):
            if len(values) != (num_trained := side.mask.count(1)):
                return RowRefused(
                    "token_mismatch",
                    f"{name}[{i}] has {len(values)} numbers, and completion {i} has {num_trained} trained tokens",
                    expected="one log-prob per trained token, the end token included",
                    fix="give the rows as tokens (prompt_ids and completion_ids), as they were sampled, or leave out "
                    f"{name}",
                )
    return None


def with_numbers(group: Group, numbers: Mapping[str, tuple[Any, ...]]) -> Group:
    """The group with the row's numbers; those of tokens that were cut off are left out."""
    beside: dict[str, array[float]] = {}
    for name, values in numbers.items():
        if name in OF_TOKENS:
            kept = (own[: c.num_scored] for own, c in zip(values, group.completions, strict=True))
            beside[name] = array("d", chain.from_iterable(kept))
        else:
            beside[name] = array("d", values)
    return replace(group, numbers=beside) if beside else group


def check_groups(groups: Groups | Sequence[Group], reads: frozenset[str], advantage: str) -> None:
    """Refuse groups that lack what the objective reads, that have it in part, or that are too small for their baseline.

    Args:
        reads: names of the columns that the objective needs. advantage: how it makes advantages of rewards.

    Raises:
        DataError: names the first row.
    """
    if not isinstance(groups, Groups):
        return  # an empty validation set
    for name in NUMBERS:
        has = groups.counts(name) > 0
        if not has.all() and (name in reads or has.any()):
            row = groups[int(has.argmin())].origin
            raise DataError(
                f"the row has no {name}" + (f", and {int(has.sum())} of {len(has)} rows have it" if has.any() else ""),
                where=str(row),
                expected=f"{name} in every row" + ("" if name in reads else ", or in none"),
                fix=f"add {name}: {HOW[name]}",
            )
    sizes = groups.counts("completions")
    if advantage not in ("reinforce++", "none") and (sizes < 2).any():
        raise DataError(
            "the group has one completion, and there is nothing to compare it with",
            where=str(groups[int(sizes.argmin())].origin),
            expected=f"at least two completions per prompt (post_training.advantage: {advantage})",
            fix="sample more completions per prompt, or set post_training.advantage: reinforce++",
        )


HOW = {
    "rewards": "a list with a number per completion",
    **dict.fromkeys(OF_TOKENS, "a list per completion with the log-prob of each of its tokens when it was sampled"),
}
"""What a row's numbers look like."""
