"""`training.packing`: rows filled with groups. Floor 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from strop.lengths import Sized, lengths_of, starts_of, taken_ragged


@dataclass(frozen=True, eq=False)
class FilledRows(Sequence[list[int]]):
    """Which groups are in which row. groups: [G] indices, row after row. starts: [rows + 1] where each row begins."""

    groups: np.ndarray
    starts: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """[rows] groups of each row."""
        return np.diff(self.starts)

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the groups of these rows, row after row."""
        found: np.ndarray = taken_ragged(self.groups, self.starts, rows)
        return found

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> list[int]:  # type: ignore[override]
        row = range(len(self))[row]
        found: list[int] = self.groups[self.starts[row] : self.starts[row + 1]].tolist()
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FilledRows) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def filled_rows(groups: Sequence[Sized], max_tokens: int, seed: int) -> FilledRows:
    """Fills rows with groups up to `max_tokens`: the longest groups first, each into the fullest row that has room. The
    seed decides which groups of equal length share a row."""
    sizes = lengths_of(groups).num_tokens
    max_tokens = min(max_tokens, int(sizes.sum()))  # no row is longer
    order = np.random.default_rng([seed, len(sizes)]).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    row_of = np.empty(len(sizes), np.int64)
    by_room: dict[int, list[int]] = {}
    rooms = _Rooms(max(max_tokens, int(sizes.max(initial=0))))
    num_rows = 0
    for n, size in enumerate(map(int, sizes[order])):
        room = rooms.smallest(size)
        if room is None:
            room, row = max(max_tokens, size), num_rows
            num_rows += 1
        else:
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.remove(room)
        row_of[n] = row
        with_less = by_room.setdefault(room - size, [])
        if not with_less:
            rooms.add(room - size)
        with_less.append(row)
    by_row = np.argsort(row_of, kind="stable")
    return FilledRows(order[by_row], starts_of(np.bincount(row_of, minlength=num_rows)))


class _Rooms:
    """A set of numbers up to `most` that quickly finds its smallest number above a bound.

    It has one bit per number, in words of about sqrt(most) bits, and one bit per word that is not empty. Every
    operation touches two words, however many numbers there are.
    """

    def __init__(self, most: int) -> None:
        self._bits = max(1, most.bit_length() // 2)
        self._words: dict[int, int] = {}
        self._used = 0

    def add(self, number: int) -> None:
        word = number >> self._bits
        self._words[word] = self._words.get(word, 0) | 1 << (number & (1 << self._bits) - 1)
        self._used |= 1 << word

    def remove(self, number: int) -> None:
        word = number >> self._bits
        self._words[word] &= ~(1 << (number & (1 << self._bits) - 1))
        if not self._words[word]:
            self._used &= ~(1 << word)

    def smallest(self, bound: int) -> int | None:
        """The smallest number that is not below `bound`."""
        word, inside = bound >> self._bits, bound & (1 << self._bits) - 1
        if found := self._words.get(word, 0) >> inside:
            return bound + _lowest(found)
        if later := self._used >> word + 1:
            word += 1 + _lowest(later)
            return (word << self._bits) + _lowest(self._words[word])
        return None


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
