"""Named columns of numbers that belong to a batch, and the counts that say how long each column is. Floor 0.

`Structure` counts the groups, completions and tokens of a batch. `Columns` holds tensors by name, with one value per
token, completion or group, such as a reference's log-probs or labels.

Shapes: M scored tokens, P scored prompt tokens, C completions, G groups.

Nothing here knows what a column means. To add one, let the step source or the policy supply it and an objective read
it; nothing between them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Structure:
    """How many groups, completions and tokens a batch has, as Python integers: counting never waits for a device.

    completions_per_group: [G]. tokens_per_completion: [C], scored tokens only. prompt_lengths: [G], all tokens of each
    prompt; every token but the first can be scored.
    """

    completions_per_group: tuple[int, ...]
    tokens_per_completion: tuple[int, ...]
    prompt_lengths: tuple[int, ...]

    @classmethod
    def join(cls, parts: Iterable[Structure]) -> Structure:
        """The structure of several micro-batches together, as if they were one."""
        listed = list(parts)
        return cls(
            tuple(n for p in listed for n in p.completions_per_group),
            tuple(n for p in listed for n in p.tokens_per_completion),
            tuple(n for p in listed for n in p.prompt_lengths),
        )

    @property
    def num_groups(self) -> int:
        return len(self.completions_per_group)

    @property
    def num_completions(self) -> int:
        return len(self.tokens_per_completion)

    @property
    def num_tokens(self) -> int:
        """M: scored tokens of completions."""
        return sum(self.tokens_per_completion)

    @property
    def num_prompt_tokens(self) -> int:
        """P: tokens of prompts that can be scored."""
        return sum(self.prompt_lengths) - self.num_groups

    @property
    def of_levels(self) -> tuple[int, int, int, int]:
        """How long a column of each level of `Columns` is, in their order."""
        return self.num_tokens, self.num_completions, self.num_groups, self.num_prompt_tokens

    def completion_index(self) -> Tensor:
        """[M] int64: the completion of each scored token."""
        return torch.repeat_interleave(torch.tensor(self.tokens_per_completion, dtype=torch.int64))

    def group_index(self) -> Tensor:
        """[C] int64: the group of each completion."""
        return torch.repeat_interleave(torch.tensor(self.completions_per_group, dtype=torch.int64))


Unit = Callable[[Structure], int]
"""Counts what a loss term is divided by. The count of a step is the sum of the counts of its micro-batches."""


def groups(structure: Structure) -> int:
    """A `Unit`: the loss term is a mean over groups."""
    return structure.num_groups


def completions(structure: Structure) -> int:
    """A `Unit`: the loss term is a mean over completions."""
    return structure.num_completions


def tokens(structure: Structure) -> int:
    """A `Unit`: the loss term is a mean over scored tokens of completions."""
    return structure.num_tokens


class Columns(NamedTuple):
    """Named tensors, each with one value (or row of values) per scored token, completion, group or scored prompt token.

    A name occurs once, whatever its level. This is a named tuple of dictionaries because code that wraps modules
    (hooks, sharding) finds tensors in tuples and dictionaries only.
    """

    per_token: Mapping[str, Tensor] = {}
    per_completion: Mapping[str, Tensor] = {}
    per_group: Mapping[str, Tensor] = {}
    per_prompt_token: Mapping[str, Tensor] = {}

    @classmethod
    def join(cls, parts: Sequence[Columns]) -> Columns:
        """Concatenates the columns of several groups or micro-batches.

        Raises:
            ValueError: some have a column that others lack.
        """
        levels = []
        for same_level in zip(*parts, strict=True):
            names = same_level[0].keys()
            if odd := next((level.keys() ^ names for level in same_level if level.keys() != names), None):
                raise ValueError(f"some parts have a column that others lack: {', '.join(sorted(odd))}")
            levels.append({name: torch.cat([level[name] for level in same_level]) for name in names})
        return cls(*levels)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for level in self for name in level)

    def find(self, name: str) -> Tensor:
        """The column of that name.

        Raises:
            KeyError: there is none.
        """
        for level in self:
            if name in level:
                return level[name]
        raise KeyError(f"no column {name!r}; there are: {', '.join(sorted(self.names)) or 'none'}")

    def only(self, name: str) -> Columns:
        """The column of that name alone.

        Raises:
            KeyError: there is none.
        """
        self.find(name)
        return Columns(*({name: level[name]} if name in level else {} for level in self))

    def beside(self, other: Columns) -> Columns:
        """These columns and the others together.

        Raises:
            ValueError: both have a column of the same name.
        """
        if twice := self.names & other.names:
            raise ValueError(f"these columns are supplied twice: {', '.join(sorted(twice))}")
        return Columns(*({**own, **more} for own, more in zip(self, other, strict=True)))

    def split(self, structure: Structure) -> list[Columns]:
        """[G] those of each group."""
        s = structure
        of_group = iter(s.tokens_per_completion)
        tokens = [sum(next(of_group) for _ in range(n)) for n in s.completions_per_group]
        counts = (tokens, s.completions_per_group, [1] * s.num_groups, [n - 1 for n in s.prompt_lengths])
        levels: list[list[dict[str, Tensor]]] = []
        for level, sizes in zip(self, counts, strict=True):
            parts: list[dict[str, Tensor]] = [{} for _ in sizes]
            for name, column in level.items():
                for part, values in zip(parts, torch.split(column, list(sizes)), strict=True):
                    part[name] = values
            levels.append(parts)
        return [Columns(*parts) for parts in zip(*levels, strict=True)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Columns:
        """The same columns, each replaced by `change(column)`."""
        return Columns(*({name: change(column) for name, column in level.items()} for level in self))

    def check(self, structure: Structure) -> None:
        """Refuses columns that do not belong to this structure.

        Raises:
            ValueError: a column has another length than there are tokens, completions or groups.
        """
        for what, level, length in zip(self._fields, self, structure.of_levels, strict=True):
            for name, column in level.items():
                if len(column) != length:
                    raise ValueError(f"column {name} has {len(column)} values, expected {length} ({what})")


NO_COLUMNS = Columns()
