"""Which groups make which optimizer step. Floor 2.

Nothing here has state: the groups of a step depend only on the seed, the number of groups, groups_per_step and the step
(under `training.packing`, also on the lengths of the groups). So a resume needs nothing but the step.

Steps are counted from 1; epochs, and steps within an epoch, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import numpy as np

from strop.lengths import starts_of
from strop.plan.packing import FilledRows


@dataclass(frozen=True)
class Plan:
    """Which groups each step takes: `groups_per_step` of `num_groups` groups, for `num_steps` steps.

    Every epoch has its own permutation; its last step takes what is left. rows: under `training.packing`, the groups in
    each filled row; `groups_per_step` then counts rows. steps_per_round: so many steps, one after the other, form a
    round. passes_per_round: how many times the steps of a round are taken before the next round.
    """

    num_groups: int
    groups_per_step: int
    num_steps: int
    seed: int
    rows: FilledRows | None = None
    steps_per_round: int = 1
    passes_per_round: int = 1

    @classmethod
    def of(
        cls,
        num_groups: int,
        groups_per_step: int,
        num_epochs: int,
        max_steps: int | None,
        seed: int,
        rows: FilledRows | None = None,
        steps_per_round: int = 1,
        passes_per_round: int = 1,
    ) -> Plan:
        """`max_steps` decides the length of the run or, if it is None, `num_epochs`."""
        found = cls(num_groups, groups_per_step, 0, seed, rows, steps_per_round, passes_per_round)
        return replace(found, num_steps=max_steps or num_epochs * found.steps_per_epoch)

    @property
    def num_rows(self) -> int:
        """How many there are of what `groups_per_step` counts: groups, or rows filled with groups."""
        return self.num_groups if self.rows is None else len(self.rows)

    @property
    def steps_per_epoch(self) -> int:
        return self._different_steps * self.passes_per_round

    @property
    def _different_steps(self) -> int:
        """The steps of an epoch, those of a round counted once."""
        return ceil(self.num_rows / self.groups_per_step)

    @property
    def num_epochs(self) -> int:
        """Epochs that the run begins."""
        return ceil(self.num_steps / self.steps_per_epoch)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch), both from 0, of step `step`, from 1."""
        return divmod(step - 1, self.steps_per_epoch)

    def round(self, step: int) -> range:
        """The steps of the first pass through the round of this step. Further passes take the same groups again."""
        epoch, inside = self.position(step)
        number = inside // (self.steps_per_round * self.passes_per_round)
        size = min(self.steps_per_round, self._different_steps - number * self.steps_per_round)
        first = 1 + epoch * self.steps_per_epoch + number * self.steps_per_round * self.passes_per_round
        return range(first, first + size)

    def first_time(self, step: int) -> int:
        """The step that has the same groups as this one, the first time that its round is gone through."""
        steps = self.round(step)
        return steps[(step - steps.start) % len(steps)]

    def groups(self, step: int) -> tuple[int, ...]:
        """Indices of the groups of step `step`, from 1."""
        return tuple(self._groups(step).tolist())

    def _groups(self, step: int) -> np.ndarray:
        epoch, inside = self.position(step)
        if self.passes_per_round > 1:
            first, number = self.first_time(step), inside // (self.steps_per_round * self.passes_per_round)
            inside = number * self.steps_per_round + first - self.round(step).start
        order = _epoch_order(self.seed, epoch, self.num_rows)
        chosen = order[inside * self.groups_per_step : (inside + 1) * self.groups_per_step]
        return chosen if self.rows is None else self.rows.groups_of(chosen)

    def epoch(self, epoch: int, num_steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The indices of an epoch's groups in order, and [steps + 1] where each step begins; at most `num_steps`. Steps
        that are gone through again count once."""
        steps = self._different_steps if num_steps is None else min(num_steps, self._different_steps)
        starts = np.minimum(np.arange(steps + 1) * self.groups_per_step, self.num_rows)
        order = _epoch_order(self.seed, epoch, self.num_rows)[: starts[-1]]
        if self.rows is None:
            return order, starts
        return self.rows.groups_of(order), starts_of(self.rows.counts[order])[starts]

    def visits(self, step: int) -> tuple[int, ...]:
        """The visits of a step. A visit is a group in an epoch, numbered epoch * num_groups + index."""
        epoch, _ = self.position(step)
        return tuple((epoch * self.num_groups + self._groups(step).astype(np.int64)).tolist())

    def all_visits(self) -> np.ndarray:
        """Every visit of the run, in its order."""
        visits = []
        for epoch in range(self.num_epochs):
            order, _ = self.epoch(epoch, self.num_steps - epoch * self.steps_per_epoch)
            visits.append(order.astype(np.int64) + epoch * self.num_groups)
        return np.concatenate(visits)

    def all_groups(self) -> Sequence[int] | np.ndarray:
        """Every group that the run will meet, in ascending order: all of them, unless it ends in its first epoch."""
        if self.num_steps >= self.steps_per_epoch:
            return range(self.num_groups)
        order, _ = self.epoch(0, self.num_steps)
        return np.sort(order)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_groups: int) -> np.ndarray:
    order = np.arange(num_groups, dtype=np.int32 if num_groups < 2**31 else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(order)  # the same as `permutation`, in half of the memory
    return order
