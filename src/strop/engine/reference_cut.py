"""How scoring with the reference is cut into micro-batches, so that each different completion is scored once. Floor 3.

The completions of all groups are numbered from 0, and arrays hold what is known of each, so that a million rows do not
become a million Python objects.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strop.lengths import keys_of, starts_of
from strop.types import Group, GroupLengths

Ints = NDArray[np.int64]
CutInto = Callable[[Mapping[int, GroupLengths], Iterable[int]], list[list[int]]]
"""Cuts groups into micro-batches: (lengths of groups by number, numbers to take) -> numbers per micro-batch."""

WINDOW = 1024
"""How many groups are cut into micro-batches together. If rows are added at the end of a data set, all earlier windows
stay the same, so their stored log-probs are still found. Only the last micro-batch of a window is not full."""


@dataclass(frozen=True)
class Wanted:
    """The C completions of the G groups that have to be scored.

    numbers: [G] of the groups. starts: [G + 1] the first completion of each group. prompts: [G] and lengths: [C] in
    tokens. token_starts: [C + 1] where the scored tokens of each completion begin. keys: [C, 2] uint64, equal for equal
    completions of equal prompts.
    """

    numbers: Ints
    starts: Ints
    prompts: Ints
    lengths: Ints
    token_starts: Ints
    keys: NDArray[np.uint64]

    @classmethod
    def of(cls, groups: Sequence[Group], numbers: Sequence[int] | np.ndarray) -> Wanted:
        known = keys_of(groups, numbers)
        lengths = known.lengths
        of_prompts = np.repeat(known.prompts, lengths.counts)
        return cls(
            np.asarray(numbers, np.int64),
            lengths.starts.astype(np.int64),
            lengths.prompt.astype(np.int64),
            lengths.completions.astype(np.int64),
            starts_of(known.scored),
            np.stack((of_prompts, known.completions), axis=1).astype("<u8", copy=False),
        )


class ReferenceCut:
    """The wanted completions, cut into micro-batches. Equal completions of equal prompts are scored once, where the
    first of them stands.

    order: completions, micro-batch by micro-batch. bounds: [micro-batches + 1] where each begins in `order`. by_key,
    key_starts: all completions sorted by key, and where each key begins.
    """

    def __init__(self, wanted: Wanted, order: Ints, bounds: Ints, by_key: Ints, key_starts: Ints) -> None:
        self._wanted, self._order, self._bounds = wanted, order, bounds
        self._by_key, self._key_starts = by_key, key_starts
        self._run_of = np.empty(len(by_key), np.int64)
        self._run_of[by_key] = np.repeat(np.arange(len(key_starts) - 1), np.diff(key_starts))

    @classmethod
    def of(cls, wanted: Wanted, cut_into: CutInto) -> ReferenceCut:
        low, high = wanted.keys[:, 0], wanted.keys[:, 1]
        by_key = np.lexsort((high, low))  # stable: among equal keys, the first completion comes first
        changes = (low[by_key][1:] != low[by_key][:-1]) | (high[by_key][1:] != high[by_key][:-1])
        key_starts = np.concatenate(([0], np.flatnonzero(changes) + 1, [len(by_key)]))
        is_new = np.zeros(len(by_key), bool)
        is_new[by_key[key_starts[:-1]]] = True
        with_new = np.flatnonzero(np.add.reduceat(is_new, wanted.starts[:-1]))
        order, bounds = array("q"), array("q", [0])
        for begin in range(0, len(with_new), WINDOW):
            new: dict[int, list[int]] = {}
            for g in with_new[begin : begin + WINDOW].tolist():
                own = range(int(wanted.starts[g]), int(wanted.starts[g + 1]))
                new[g] = [c for c in own if is_new[c]]
            sizes = {
                g: GroupLengths(int(wanted.prompts[g]), tuple(int(wanted.lengths[c]) for c in own))
                for g, own in new.items()
            }
            for part in cut_into(sizes, sizes):
                order.extend(c for g in part for c in new[g])
                bounds.append(len(order))
        return cls(wanted, np.array(order, np.int64), np.array(bounds, np.int64), by_key, key_starts)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def num_completions(self) -> int:
        return len(self._order)

    def completions(self, n: int) -> Ints:
        return self._order[self._bounds[n] : self._bounds[n + 1]]

    def _by_group(self, n: int) -> Iterator[tuple[int, Ints]]:
        """Pairs of a group (its place among the wanted ones) and its completions that are in this micro-batch."""
        completions = self.completions(n)
        owners = np.searchsorted(self._wanted.starts, completions, side="right") - 1
        stops = np.flatnonzero(np.diff(owners)) + 1
        for own, owner in zip(np.split(completions, stops), owners[np.concatenate(([0], stops))], strict=True):
            yield int(owner), own

    def key(self, n: int) -> bytes:
        """A hash (16 bytes) of all that is scored together: prompts, completions and their order."""
        digest = hashlib.blake2b(digest_size=16)
        for _, own in self._by_group(n):
            digest.update(struct.pack("<I", len(own)) + self._wanted.keys[own].tobytes())
        return digest.digest()

    def groups(self, n: int, groups: Sequence[Group]) -> list[Group]:
        """The groups of the micro-batch, each with only those completions that are scored in it."""
        found = []
        for owner, own in self._by_group(n):
            group = groups[int(self._wanted.numbers[owner])]
            chosen = tuple(group.completions[c] for c in (own - self._wanted.starts[owner]).tolist())
            found.append(replace(group, completions=chosen))
        return found

    def num_tokens(self, n: int) -> int:
        """Tokens of the micro-batch as a shared-prefix row."""
        prompts = sum(int(self._wanted.prompts[owner]) for owner, _ in self._by_group(n))
        return prompts + int((self._wanted.lengths[self.completions(n)] - 1).sum())

    def _sizes(self, n: int) -> Ints:
        completions, starts = self.completions(n), self._wanted.token_starts
        return starts[completions + 1] - starts[completions]

    def spans(self, n: int) -> list[tuple[int, int]]:
        """Where each completion of the micro-batch begins and ends among the scored tokens of all wanted groups."""
        starts = self._wanted.token_starts[self.completions(n)]
        return list(zip(starts.tolist(), (starts + self._sizes(n)).tolist(), strict=True))

    def places(self, n: int, values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Where the log-probs of the micro-batch belong: pairs of (place of the first token, log-probs).

        The place counts the scored tokens of all wanted groups. A completion that stands in several groups gives one
        pair for each. values: [scored tokens of the micro-batch].
        """
        parts = np.split(values, np.cumsum(self._sizes(n))[:-1])
        for completion, part in zip(self.completions(n).tolist(), parts, strict=True):
            run = int(self._run_of[completion])
            for same in self._by_key[self._key_starts[run] : self._key_starts[run + 1]].tolist():
                yield int(self._wanted.token_starts[same]), part
