"""Which groups make which optimizer step, and how a step is cut into micro-batches. Floor 2.

Nothing here has state: the groups of a step are a function of (seed, number of groups, groups_per_step, step), under
`training.packing` of the groups' lengths, too; so the step number is all that a resume has to know. How a step is cut
depends on the hardware and changes no result.

Steps count from 1; epochs and the steps inside one from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from strop.data.table import Groups
from strop.types import Group, GroupLengths

Sized = Group | GroupLengths
"""What a plan cuts: groups, or their lengths alone."""

RowTokens = Callable[[Sequence[Sized]], int]
"""Tokens that a micro-batch of these groups makes a model compute, padding included."""


def lengths(groups: Sequence[Sized]) -> Sequence[Sized]:
    """Lengths in place of groups that lie on disk, whose lengths are known without reading them."""
    return groups.lengths if isinstance(groups, Groups) else groups


def packed_tokens(groups: Sequence[Sized]) -> int:
    """Tokens of one shared-prefix row."""
    return sum(g.num_tokens for g in groups)


def padded_tokens(groups: Sequence[Sized]) -> int:
    """Tokens of plain rows padded to the longest, one row a completion."""
    rows = [group.lengths.prompt + n - 1 for group in groups for n in group.lengths.completions]
    return len(rows) * max(rows)


@dataclass(frozen=True)
class Plan:
    """The recipe of a run as data: `num_groups` rows, `groups_per_step` of them a step, for `num_steps` steps.

    Every epoch is its own permutation; its last step takes what is left. rows: under `training.packing`, the groups
    of each filled row; then `groups_per_step` counts these.
    """

    num_groups: int
    groups_per_step: int
    num_steps: int
    seed: int
    rows: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(
        cls,
        num_groups: int,
        groups_per_step: int,
        num_epochs: int,
        max_steps: int | None,
        seed: int,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> Plan:
        """`max_steps`, where given, decides the length of the run; else `num_epochs`."""
        filled = None if rows is None else tuple(map(tuple, rows))
        steps_per_epoch = ceil((num_groups if filled is None else len(filled)) / groups_per_step)
        return cls(num_groups, groups_per_step, max_steps or num_epochs * steps_per_epoch, seed, filled)

    @property
    def num_rows(self) -> int:
        """What `groups_per_step` counts: groups, or rows filled with them."""
        return self.num_groups if self.rows is None else len(self.rows)

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.num_rows / self.groups_per_step)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch), both from 0, of step `step`, from 1."""
        return divmod(step - 1, self.steps_per_epoch)

    def groups(self, step: int) -> tuple[int, ...]:
        """Indices of the groups of step `step`, from 1."""
        epoch, inside = self.position(step)
        order = _epoch_order(self.seed, epoch, self.num_rows)
        chosen = order[inside * self.groups_per_step : (inside + 1) * self.groups_per_step].tolist()
        return tuple(chosen) if self.rows is None else tuple(i for row in chosen for i in self.rows[row])

    @property
    def num_epochs(self) -> int:
        """Epochs that the run begins."""
        return ceil(self.num_steps / self.steps_per_epoch)

    def visits(self, step: int) -> tuple[int, ...]:
        """The groups of step `step` counted over all epochs: epoch * num_groups + index."""
        epoch, _ = self.position(step)
        return tuple(epoch * self.num_groups + i for i in self.groups(step))

    def all_visits(self) -> list[int]:
        """Every visit of the run."""
        return [visit for step in range(1, self.num_steps + 1) for visit in self.visits(step)]

    def all_groups(self) -> list[int]:
        """Every group that the run will meet, in ascending order: all of them, unless it ends in its first epoch."""
        if self.num_steps >= self.steps_per_epoch:
            return list(range(self.num_groups))
        return sorted(i for step in range(1, self.num_steps + 1) for i in self.groups(step))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_groups: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_groups)


def filled_rows(groups: Sequence[Sized], max_tokens: int, seed: int) -> list[list[int]]:
    """Indices of the groups of each row, the rows filled to `max_tokens`: the longest groups first, each into the
    fullest row that has room for it. Which of alike length share a row is a function of the seed."""
    sizes = np.array([group.num_tokens for group in lengths(groups)])
    max_tokens = min(max_tokens, int(sizes.sum()))  # no row is longer
    order = np.random.default_rng([seed, len(sizes)]).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where a row has room for r tokens more
    for i in order.tolist():
        size = int(sizes[i])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            rooms ^= (not by_room[room]) << room
        else:
            room, row = max(max_tokens, size), len(rows)
            rows.append([])
        rows[row].append(i)
        by_room.setdefault(room - size, []).append(row)
        rooms |= 1 << (room - size)
    return rows


OPEN = 8
"""Micro-batches that are looked at for room: enough for a step, and a pass over many rows stays linear."""


def cut(
    groups: Sequence[Sized] | Mapping[int, Sized], indices: Iterable[int], budget: int, tokens: RowTokens
) -> list[list[int]]:
    """Indices of groups into micro-batches of at most `budget` tokens; one that is longer stands alone.

    The longest first, which needs the most memory; each into that of the last `OPEN` which it lengthens the least, of
    those the fullest. So rows that share prompts are filled, and padded ones hold alike lengths.
    """
    groups = groups.lengths if isinstance(groups, Groups) else groups
    parts: list[list[int]] = []
    members: list[list[Sized]] = []
    used: list[int] = []
    for i in sorted(indices, key=lambda i: groups[i].num_tokens, reverse=True):
        group = groups[i]
        own = tokens([group])
        longer = {
            at: tokens([*members[at], group])
            for at in range(max(0, len(parts) - OPEN), len(parts))
            if used[at] + own <= budget
        }
        fitting = [at for at, size in longer.items() if size <= budget]
        if fitting:
            best = min(fitting, key=lambda at: (longer[at] - used[at], -used[at]))
            used[best] = longer[best]
        else:
            best = len(parts)
            parts.append([])
            members.append([])
            used.append(own)
        parts[best].append(i)
        members[best].append(group)
    return parts


CPU_TOKENS = 2048
"""Tokens of a micro-batch up to which a CPU gains: larger ones only take more memory. Short rows of a small model took
1.8 times as long in micro-batches of 130 tokens."""


def default_budget(groups: Sequence[Sized], batch_size: int, tokens: RowTokens, device_type: str) -> int:
    """Tokens of a micro-batch, where nobody says."""
    return batch_budget(batch_size, max(tokens([g]) for g in lengths(groups)), device_type)


def batch_budget(batch_size: int, longest: int, device_type: str) -> int:
    """On a GPU what `batch_size` of the longest cost; on a CPU `CPU_TOKENS`, or the longest."""
    return max(longest, CPU_TOKENS) if device_type == "cpu" else batch_size * longest
