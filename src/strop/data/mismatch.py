"""Every prompt with a completion of another row: what a divergence of policy and reference is estimated on. Floor 2.

In: groups of one completion each. Out: a sequence of groups, one a row and epoch, made when they are asked for; a pure
function of (seed, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

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
        self._prompts = _numbered(groups)
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
        if epoch not in self._partners:
            self._partners[epoch] = partners(self._prompts, self._seed, epoch)
        own, other = self._groups[row], self._groups[int(self._partners[epoch][row])]
        room = self._max_tokens - max(len(c.ids) for c in other.completions)
        return Group(own.prompt_ids[-max(1, room) :], other.completions, own.origin)


def _numbered(groups: Sequence[Group]) -> NDArray[np.int64]:
    """For each group the number of its prompt, in the order in which prompts come first. Kept of a prompt is a hash of
    its tokens, so that a million of them take little room."""
    hashes = bytearray()
    for group in groups:
        hashes += hashlib.blake2b(group.prompt_ids.tobytes(), digest_size=16).digest()
    low, high = np.frombuffer(hashes, np.uint64).reshape(-1, 2).T
    rows = np.lexsort((high, low))  # stable: of equal prompts the first comes first
    differs = (low[rows][1:] != low[rows][:-1]) | (high[rows][1:] != high[rows][:-1])
    starts = np.concatenate(([0], np.flatnonzero(differs) + 1))
    number = np.empty(len(starts), np.int64)
    number[np.argsort(rows[starts])] = np.arange(len(starts))
    found = np.empty(len(groups), np.int64)
    found[rows] = np.repeat(number, np.diff(starts, append=len(rows)))
    return found


def partners(prompts: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """For each row another one, never itself, and of another prompt unless most rows share one; each is taken once.

    prompts: a number a row, from 0, equal for equal prompts.
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
