"""Pairs every prompt with a completion of another row, to estimate how far policy and reference differ. Floor 2.

In: groups of one completion each. Out: a sequence of groups, one per row and epoch, made on demand. It depends only on
the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from strop.lengths import Keys, Lengths, keys_of, lengths_of, prompt_key
from strop.types import Group


class Mismatched(Sequence[Group]):
    """The groups of `num_epochs` epochs. Index: the visit, epoch * rows + row (`Plan.visits`).

    Args:
        groups: at least two.
        max_tokens: of a prompt and its completion together; the prompt gives way, at the left.
    """

    def __init__(self, groups: Sequence[Group], *, num_epochs: int, seed: int, max_tokens: int) -> None:
        assert len(groups) > 1
        self._groups, self._num_epochs, self._seed, self._max_tokens = groups, num_epochs, seed, max_tokens
        self._prompts = _numbered(keys_of(groups, range(len(groups))).prompts)
        self._partners: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._groups) * self._num_epochs

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, index: int | slice) -> Group | tuple[Group, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, row = divmod(index, len(self._groups))
        own, other = self._groups[row], self._groups[int(self._partners_in(epoch)[row])]
        room = self._max_tokens - max(len(c.ids) for c in other.completions)
        return Group(own.prompt_ids[-max(1, room) :], other.completions, own.origin)

    def _partners_in(self, epoch: int) -> NDArray[np.int64]:
        """For each row the one whose completion it gets; those of two epochs are kept."""
        if epoch not in self._partners:
            while len(self._partners) > 1:
                del self._partners[next(iter(self._partners))]
            self._partners[epoch] = partners(self._prompts, self._seed, epoch)
        return self._partners[epoch]

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths of all groups."""
        rows, others = self._rows(np.arange(len(self)))
        whole = lengths_of(self._groups)
        return self._cut(whole.taken(rows), whole.taken(others))

    def keyed(self, numbers: np.ndarray) -> Keys:
        """Keys of the groups of these numbers; a prompt that has given way is read."""
        rows, others = self._rows(numbers)
        own, other = keys_of(self._groups, rows), keys_of(self._groups, others)
        lengths, prompts = self._cut(own.lengths, other.lengths), own.prompts.copy()
        for i in np.flatnonzero(lengths.prompt < own.lengths.prompt).tolist():
            prompts[i] = prompt_key(self[int(numbers[i])].prompt_ids)
        return Keys(lengths, other.scored, prompts, other.completions)

    def _rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each visit the row of its prompt and that of its completion."""
        epochs, rows = np.divmod(numbers, len(self._groups))
        others = np.empty_like(rows)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            others[here] = self._partners_in(epoch)[rows[here]]
        return rows, others

    def _cut(self, own: Lengths, other: Lengths) -> Lengths:
        """Prompts of these lengths, as far as they have room, with completions of those."""
        room = np.maximum(1, self._max_tokens - other.longest.astype(np.int64))
        return Lengths(np.minimum(own.prompt, room), other.completions, other.starts)


def _numbered(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each group the number of its prompt, in the order in which prompts come first."""
    _, firsts, found = np.unique(keys, return_index=True, return_inverse=True)
    number = np.empty(len(firsts), np.int64)
    number[np.argsort(firsts)] = np.arange(len(firsts))
    return np.asarray(number[found])


def partners(prompts: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """For each row another one, never itself, and of another prompt unless most rows share one; each is taken once.

    prompts: one number per row, from 0, equal for equal prompts.
    """
    draw = np.random.default_rng([seed, epoch, 1])  # [seed, epoch] orders the rows
    counts = np.bincount(prompts)
    rows = draw.permutation(len(prompts))
    # the rows of a prompt side by side: one shift by the longest such run leads each of them out of its own
    rows = rows[np.argsort(draw.permutation(len(counts))[prompts[rows]], kind="stable")]
    shift = int(counts.max()) if counts.max() < len(prompts) else 1
    found = np.empty_like(rows)
    found[rows] = np.roll(rows, -shift)
    return found
