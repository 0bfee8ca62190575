"""How a pass of the reference is cut: wanted completions numbered through, each scored once, in micro-batches. Floor 3.

Arrays of numbers stand for completions, so that a million rows are no million objects.
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

from strop.policy.reference_store import completion_key
from strop.types import Group, GroupLengths

Ints = NDArray[np.int64]
CutInto = Callable[[Mapping[int, GroupLengths], Iterable[int]], list[list[int]]]
"""Lengths of groups by number, and which of them -> micro-batches of these numbers."""

WINDOW = 1024
"""Groups that are cut into micro-batches together, in the order of the run. Rows that are added at the end of a data
set therefore leave the windows before them as they were; only the last micro-batch of a window is not full."""


@dataclass(frozen=True)
class Wanted:
    """The completions of some groups, numbered through: C of G groups.

    numbers: [G] of the groups. starts: [G + 1] the first completion of each. prompts: [G], lengths: [C] in tokens.
    token_starts: [C + 1] where the scored tokens of each begin. keys: [C, 2] uint64, equal for the same completion at
    the same prompt.
    """

    numbers: Ints
    starts: Ints
    prompts: Ints
    lengths: Ints
    token_starts: Ints
    keys: NDArray[np.uint64]

    @classmethod
    def of(cls, groups: Sequence[Group], numbers: Sequence[int]) -> Wanted:
        starts, prompts, lengths, token_starts, keys = (*(array("q") for _ in range(4)), bytearray())
        starts.append(0)
        token_starts.append(0)
        for i in numbers:  # groups stay on disk; a few numbers of each are kept
            group = groups[i]
            prompts.append(len(group.prompt_ids))
            starts.append(starts[-1] + len(group.completions))
            for completion in group.completions:
                lengths.append(len(completion.ids))
                token_starts.append(token_starts[-1] + completion.num_scored)
                keys += completion_key(group, completion)
        return cls(
            np.array(numbers, np.int64),
            np.array(starts, np.int64),
            np.array(prompts, np.int64),
            np.array(lengths, np.int64),
            np.array(token_starts, np.int64),
            np.frombuffer(keys, "<u8").reshape(-1, 2),
        )


class MicroBatches:
    """The cut of wanted completions into micro-batches, each completion in one of them, where it comes first.

    order: completions, micro-batch by micro-batch. bounds: [micro-batches + 1] into it.
    """

    def __init__(self, wanted: Wanted, order: Ints, bounds: Ints, by_key: Ints, key_starts: Ints) -> None:
        self._wanted, self._order, self._bounds = wanted, order, bounds
        self._by_key, self._key_starts = by_key, key_starts
        self._run_of = np.empty(len(by_key), np.int64)
        self._run_of[by_key] = np.repeat(np.arange(len(key_starts) - 1), np.diff(key_starts))

    @classmethod
    def of(cls, wanted: Wanted, cut_into: CutInto) -> MicroBatches:
        low, high = wanted.keys[:, 0], wanted.keys[:, 1]
        by_key = np.lexsort((high, low))  # stable: of equal ones the first comes first
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
        """(place of a group among the wanted ones, its completions that are scored here), group by group."""
        completions = self.completions(n)
        owners = np.searchsorted(self._wanted.starts, completions, side="right") - 1
        stops = np.flatnonzero(np.diff(owners)) + 1
        for own, owner in zip(np.split(completions, stops), owners[np.concatenate(([0], stops))], strict=True):
            yield int(owner), own

    def key(self, n: int) -> bytes:
        """16 bytes that stand for all that is scored together: prompts, completions, their order."""
        digest = hashlib.blake2b(digest_size=16)
        for _, own in self._by_group(n):
            digest.update(struct.pack("<I", len(own)) + self._wanted.keys[own].tobytes())
        return digest.digest()

    def groups(self, n: int, groups: Sequence[Group]) -> list[Group]:
        """What is scored together, with the completions alone that come first here."""
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

    def places(self, n: int, values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
        """(where it begins among the scored tokens of all wanted groups, log-probs) of each completion of the
        micro-batch, as often as it stands in a group. values: [scored tokens of the micro-batch]."""
        parts = np.split(values, np.cumsum(self._sizes(n))[:-1])
        for completion, part in zip(self.completions(n).tolist(), parts, strict=True):
            run = int(self._run_of[completion])
            for same in self._by_key[self._key_starts[run] : self._key_starts[run + 1]].tolist():
                yield int(self._wanted.token_starts[same]), part
