"""Counts over one micro-batch or all of an epoch, from which memory and time are predicted. Floor 2.

In: lengths of groups, and how steps are cut. Out: `Work`, arrays with one number per micro-batch. An epoch is cut once,
a number of steps at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from strop.lengths import Lengths, Sized, starts_of
from strop.plan.cutting import cut_steps
from strop.plan.order import Plan
from strop.plan.row_tokens import RowTokens, padded_width

Ints = np.ndarray


@dataclass(frozen=True, eq=False)
class Work:
    """Counts over B micro-batches, [B] each.

    tokens: those of its rows, including padding. seen: the sum over its queries of the keys that each sees. scored: an
    upper bound of its scored tokens. longest: tokens of its longest group. again: tokens of prompts that plain rows
    repeat. squares: the sum of the squares of its groups' tokens.
    """

    tokens: Ints
    seen: np.ndarray
    scored: Ints
    longest: Ints
    again: Ints
    squares: Ints

    @classmethod
    def of(cls, groups: Iterable[Sized], tokens: RowTokens, *, prompts: bool = False) -> Work:
        """The counts of one micro-batch of these groups. prompts: tokens of prompts are scored too."""
        lengths = Lengths.of(groups)
        return cls.of_parts(lengths, np.array([0, len(lengths)]), tokens, prompts=prompts)

    @classmethod
    def of_parts(cls, lengths: Lengths, starts: np.ndarray, tokens: RowTokens, *, prompts: bool) -> Work:
        """The counts of several micro-batches; number b has the groups starts[b] : starts[b + 1]."""
        prompt, answers = lengths.prompt.astype(np.int64), lengths.sums(lengths.completions)
        counts, spans = lengths.counts, tokens.of_each(lengths)

        def total(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, starts[:-1])

        fed = total(spans)
        if not tokens.shares_prompts:
            fed = total(counts) * np.maximum.reduceat(padded_width(lengths), starts[:-1])
        return cls(
            tokens=fed,
            seen=total(lengths.seen),
            scored=total(answers + (prompt - 1 if prompts else 0)),
            longest=np.maximum.reduceat(spans, starts[:-1]),
            again=total(prompt * (counts - 1)),
            squares=total(spans * spans),
        )

    @classmethod
    def joined(cls, parts: Iterable[Work]) -> Work:
        """Concatenates the counts of several series of micro-batches."""
        columns = zip(*([getattr(part, field.name) for field in fields(cls)] for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def taken(self, numbers: np.ndarray | slice) -> Work:
        """The micro-batches with these indices."""
        return Work(*(getattr(self, field.name)[numbers] for field in fields(self)))

    def distinct(self) -> Work:
        """Each different micro-batch once, in any order."""
        order = np.lexsort([getattr(self, field.name) for field in fields(self)])
        differs = np.zeros(len(self), bool)
        differs[:1] = True
        for field in fields(self):
            values = getattr(self, field.name)[order]
            differs[1:] |= values[1:] != values[:-1]
        return self.taken(order[differs])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class EpochWork:
    """Counts over the micro-batches of the first epoch. Step s has those from starts[s] to starts[s + 1]."""

    work: Work
    starts: Ints

    @classmethod
    def of(cls, plan: Plan, lengths: Lengths, budget: int, tokens: RowTokens, *, prompts: bool) -> EpochWork:
        """The counts of a plan whose steps are cut into micro-batches of at most `budget` tokens. prompts: tokens of
        prompts are scored too."""
        counts: list[Ints] = []

        def works() -> Iterator[Work]:
            for numbers, starts, num_parts in cut_steps(lengths, *plan.epoch(0), budget, tokens):
                counts.append(num_parts)
                yield Work.of_parts(lengths.taken(numbers), starts, tokens, prompts=prompts)

        work = Work.joined(works())
        return cls(work, starts_of(np.concatenate(counts)))

    @property
    def num_steps(self) -> int:
        return len(self.starts) - 1

    def of_steps(self, num_steps: int) -> EpochWork:
        """The first `num_steps` steps."""
        starts = self.starts[: num_steps + 1]
        return EpochWork(self.work.taken(slice(starts[-1])), starts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[B] one number per micro-batch -> [steps] the sum over each step."""
        return np.add.reduceat(values, self.starts[:-1])
