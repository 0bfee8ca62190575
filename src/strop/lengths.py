"""Many groups as arrays, without reading them: their lengths, and keys that say which tokens are the same. Floor 1.

In: groups, or the columns that a table has of them. Out: `Lengths`, what plans, estimates and reports work on: a
sequence of `GroupLengths` that keeps no Python object per group. `Keys`, by which a pass over a reference tells what it
has scored already.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from strop.types import Completion, Group, GroupLengths

CHUNK = 1 << 14
"""Groups that are looked at together where a pass over all of them needs more than a few bytes of each."""

Sized = Group | GroupLengths
"""A group, or its lengths alone."""


@dataclass(frozen=True, eq=False)
class Lengths(Sequence[GroupLengths]):
    """The lengths of G groups with C completions together, in tokens.

    prompt: [G]. completions: [C], group after group. starts: [G + 1]; the completions of group g are
    completions[starts[g] : starts[g + 1]], at least one.
    """

    prompt: np.ndarray
    completions: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, groups: Iterable[Sized]) -> Lengths:
        """Collects the lengths of groups, or lengths that are given one by one."""
        each = [group.lengths for group in groups]
        counts = [len(group.completions) for group in each]
        return cls(
            np.array([group.prompt for group in each], np.int64),
            np.array([n for group in each for n in group.completions], np.int64),
            starts_of(np.array(counts, np.int64)),
        )

    @property
    def counts(self) -> np.ndarray:
        """[G] completions of each group."""
        return np.diff(self.starts)

    @property
    def num_tokens(self) -> np.ndarray:
        """[G] tokens of each group's shared-prefix row, as `GroupLengths.num_tokens`."""
        return np.asarray(self.sums(self.completions) + self.prompt - self.counts)

    @property
    def longest(self) -> np.ndarray:
        """[G] each group's longest completion."""
        return np.maximum.reduceat(self.completions, self.starts[:-1]) if len(self) else self.completions[:0]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[C] one value per completion -> [G] the sum over each group."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(values, self.starts[:-1], dtype=np.int64)

    @property
    def seen(self) -> np.ndarray:
        """[G] float64: how many keys the queries of each group's shared-prefix row see, summed over the queries.

        On average, a token sees half of the prompt or completion that it is in. A token of a completion also sees the
        whole prompt.
        """
        prompt, completions = self.prompt.astype(np.float64), self.completions.astype(np.int64)
        squares = self.sums(completions * completions)
        return np.asarray(prompt * prompt / 2 + prompt * self.sums(completions) + squares / 2)

    def taken(self, numbers: np.ndarray) -> Lengths:
        """The lengths of the groups with these indices, in this order."""
        starts = starts_of(self.starts[numbers + 1] - self.starts[numbers])
        return Lengths(self.prompt[numbers], taken_ragged(self.completions, self.starts, numbers), starts)

    def chunks(self) -> Iterator[Lengths]:
        """The same lengths, those of `CHUNK` groups at a time."""
        for first in range(0, len(self), CHUNK):
            starts = self.starts[first : first + CHUNK + 1]
            completions = self.completions[starts[0] : starts[-1]]
            yield Lengths(self.prompt[first : first + CHUNK], completions, starts - starts[0])

    def __len__(self) -> int:
        return len(self.prompt)

    @overload
    def __getitem__(self, index: int) -> GroupLengths: ...
    @overload
    def __getitem__(self, index: slice) -> Lengths: ...
    def __getitem__(self, index: int | slice) -> GroupLengths | Lengths:
        if isinstance(index, slice):
            return self.taken(np.arange(*index.indices(len(self))))
        number = range(len(self))[index]
        own = self.completions[self.starts[number] : self.starts[number + 1]]
        return GroupLengths(int(self.prompt[number]), tuple(own.tolist()))


@runtime_checkable
class Measured(Protocol):
    """Groups that know all their lengths without being read."""

    @property
    def lengths(self) -> Lengths: ...


def lengths_of(groups: Sequence[Sized]) -> Lengths:
    """The lengths of groups. Groups that know them (`Measured`) are not read."""
    if isinstance(groups, Lengths):
        return groups
    return groups.lengths if isinstance(groups, Measured) else Lengths.of(groups)


def starts_of(counts: np.ndarray) -> np.ndarray:
    """[n] counts -> [n + 1] where each part begins, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def taken_ragged(values: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Concatenates the parts with these indices; part n is values[starts[n] : starts[n + 1]]."""
    first = starts[numbers]
    counts = starts[numbers + 1] - first
    new = starts_of(counts)
    return np.asarray(values[np.arange(new[-1]) + np.repeat(first - new[:-1], counts)])


@dataclass(frozen=True, eq=False)
class Keys:
    """G groups with C completions together.

    lengths: in tokens. scored: [C] trained tokens of each completion. prompts: [G] uint64, equal for equal tokens.
    completions: [C] uint64, equal for equal tokens of which the same ones are trained.
    """

    lengths: Lengths
    scored: np.ndarray
    prompts: NDArray[np.uint64]
    completions: NDArray[np.uint64]

    @classmethod
    def of(cls, groups: Iterable[Group]) -> Keys:
        """The keys of groups, which are read one by one."""
        listed = list(groups)
        completions = [completion for group in listed for completion in group.completions]
        return cls(
            Lengths.of(listed),
            np.array([completion.num_scored for completion in completions], np.int64),
            np.array([prompt_key(group.prompt_ids) for group in listed], np.uint64),
            np.array([completion_key(completion) for completion in completions], np.uint64),
        )


@runtime_checkable
class Keyed(Protocol):
    """Groups whose keys are known without reading them."""

    def keyed(self, numbers: np.ndarray) -> Keys:
        """The keys of the groups with these numbers, in this order."""


def keys_of(groups: Sequence[Group], numbers: Sequence[int] | np.ndarray) -> Keys:
    """The keys of the groups with these numbers. Groups that know them (`Keyed`) are not read."""
    if isinstance(groups, Keyed):
        return groups.keyed(np.asarray(numbers, np.int64))
    return Keys.of(groups[int(i)] for i in numbers)


def prompt_key(ids: array[int]) -> int:
    """64 bits of the tokens of a prompt."""
    return hash_of(little_endian(ids))


def completion_key(completion: Completion) -> int:
    """64 bits of the tokens of a completion and of which of them are trained."""
    return hash_of(little_endian(completion.ids) + completion.loss_mask)


def hash_of(content: bytes) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def little_endian(values: array[Any]) -> bytes:
    """The same bytes on every machine."""
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return values.tobytes()
