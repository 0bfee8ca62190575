"""Groups on disk: an Arrow file a source, memory-mapped, and views of it that look like lists of groups. Floor 2.

In: encoded rows. Out: groups by index, built when they are asked for. In memory stay a few numbers a row (its place
and its lengths); the tokens stay in the file, and the operating system keeps of it what is used.

One row of the table is one group: ids (prompt, first, second completion), one byte an id (1 = trained), the three
lengths, the origin, what was done to the row, and hashes by which rows are compared.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from strop.data.counters import COUNTERS
from strop.lengths import Lengths, starts_of
from strop.types import Completion, Group, Origin

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.binary()),
        ("prompt", pa.int32()),
        ("first", pa.int32()),
        ("second", pa.int32()),
        ("scored", pa.int32()),
        ("label", pa.int32()),
        ("again", pa.int32()),
        ("line", pa.int64()),
        ("file", pa.int32()),
        *((name, pa.int32()) for name in COUNTERS),
        ("raw", pa.int32()),
        ("prompt_hash", pa.uint64()),
        ("first_hash", pa.uint64()),
        ("second_hash", pa.uint64()),
        ("digest", pa.binary(16)),
    ]
)


@dataclass(frozen=True, slots=True)
class Record:
    """A group with what was done to its row.

    prompt_key: what rows with one prompt share. file: number of the origin's file in the source. again: 1 for the
    second group of one row (a pair that labelled groups are made of); what is counted by rows is counted at the first.
    """

    group: Group
    file: int
    prompt_key: bytes
    counts: Mapping[str, int] = field(default_factory=dict)
    raw: int = 0
    again: int = 0


def to_table(records: Sequence[Record]) -> Any:
    """The records as a record batch."""
    groups = [record.group for record in records]
    seconds = [g.completions[1] if len(g.completions) > 1 else None for g in groups]
    ids, masks = [], []
    for group in groups:
        ids.append(np.concatenate([_array(group.prompt_ids), *(_array(c.ids) for c in group.completions)]))
        masks.append(bytes(len(group.prompt_ids)) + b"".join(c.loss_mask for c in group.completions))
    columns: dict[str, Any] = {
        "ids": ids,
        "mask": masks,
        "prompt": [len(g.prompt_ids) for g in groups],
        "first": [len(g.completions[0].ids) for g in groups],
        "second": [len(c.ids) if c is not None else 0 for c in seconds],
        "scored": [g.num_scored for g in groups],
        "label": [-1 if g.label is None else int(g.label) for g in groups],
        "line": [g.origin.line for g in groups],
        "file": [record.file for record in records],
        **{name: [int(record.counts.get(name, 0)) for record in records] for name in COUNTERS},
        "raw": [int(record.raw) for record in records],
        "again": [record.again for record in records],
        "prompt_hash": [_hash(record.prompt_key) for record in records],
        "first_hash": [_hash(_bytes(g.completions[0].ids)) for g in groups],
        # of a labelled group: 1 or 2, which no other group has
        "second_hash": [
            _hash(_bytes(c.ids)) if c is not None else (0 if g.label is None else 1 + g.label)
            for g, c in zip(groups, seconds, strict=True)
        ],
        "digest": [_digest(g) for g in groups],
    }
    return pa.record_batch([pa.array(columns[f.name], type=f.type) for f in SCHEMA], schema=SCHEMA)


def _array(ids: array[int]) -> np.ndarray:
    return np.frombuffer(ids, dtype=np.int32)


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _digest(group: Group) -> bytes:
    """Of the ids, masks and label alone: the same tokens give the same, wherever they were read."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_bytes(array("i", [len(group.prompt_ids), *(len(c.ids) for c in group.completions)])))
    digest.update(_bytes(group.prompt_ids))
    if group.label is not None:
        digest.update(bytes([group.label]))
    for completion in group.completions:
        digest.update(_bytes(completion.ids) + completion.loss_mask)
    return digest.digest()


def _bytes(ids: array[int]) -> bytes:
    if sys.byteorder == "big":
        ids = array("i", ids)
        ids.byteswap()
    return ids.tobytes()


class Shard:
    """The groups of one source, in a memory-mapped Arrow file.

    Args:
        files: names of the files that origins point to.
    """

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._parts = [self._reader.get_batch(i) for i in range(self._reader.num_record_batches)]
        self._starts = [0, *accumulate(part.num_rows for part in self._parts)]
        self._views = [_View(part) for part in self._parts]
        self._files = tuple(files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, in memory."""
        parts = [part.column(SCHEMA.get_field_index(name)) for part in self._parts]
        if name == "digest":
            flat = [np.frombuffer(p.buffers()[1], np.uint8, 16 * len(p), 16 * p.offset).reshape(-1, 16) for p in parts]
            return np.concatenate(flat) if flat else np.zeros((0, 16), np.uint8)
        return np.concatenate([p.to_numpy() for p in parts]) if parts else np.zeros(0, np.int64)

    def group(self, row: int) -> Group:
        n = bisect_right(self._starts, row) - 1
        return self._views[n].group(row - self._starts[n], self._files)


class _View:
    """One record batch as arrays that lie in the file."""

    def __init__(self, part: Any) -> None:
        ids, mask = part.column(0), part.column(1)
        n = part.num_rows + 1
        self._id_stops = np.frombuffer(ids.buffers()[1], np.int32, n)
        self._ids = ids.values.to_numpy(zero_copy_only=True)
        self._mask_stops = np.frombuffer(mask.buffers()[1], np.int32, n)
        self._mask = mask.buffers()[2]
        names = ("prompt", "first", "second", "line", "file", "label")
        self._numbers = [part.column(SCHEMA.get_field_index(name)).to_numpy() for name in names]

    def group(self, row: int, files: Sequence[str]) -> Group:
        prompt, first, second, line, file, label = (int(column[row]) for column in self._numbers)
        start, mask_start = int(self._id_stops[row]), int(self._mask_stops[row])
        ids = array("i")
        ids.frombytes(self._ids[start : start + prompt + first + second].tobytes())
        mask = self._mask[mask_start : mask_start + len(ids)].to_pybytes()
        stops = [prompt, prompt + first] + ([len(ids)] if second else [])
        completions = tuple(Completion(ids[a:b], mask[a:b]) for a, b in pairwise(stops))
        return Group(ids[:prompt], completions, Origin(files[file], line), None if label < 0 else bool(label))


class Groups(Sequence[Group]):
    """Rows of shards as a sequence of groups.

    Args:
        shard_of, row_of: for each group, its shard and its row there.
    """

    def __init__(self, shards: Sequence[Shard], shard_of: np.ndarray, row_of: np.ndarray) -> None:
        self.shards, self.shard_of, self._row_of = tuple(shards), shard_of, row_of

    @classmethod
    def of(cls, shard: Shard) -> Groups:
        """All rows of a shard."""
        return cls([shard], np.zeros(len(shard), np.int16), np.arange(len(shard)))

    @classmethod
    def joined(cls, parts: Sequence[Groups]) -> Groups:
        """Views of one shard each, one behind the other."""
        shard_of = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
        return cls([part.shards[0] for part in parts], shard_of, np.concatenate([part._row_of for part in parts]))

    def taken(self, numbers: np.ndarray) -> Groups:
        """The groups of these numbers, in this order."""
        return Groups(self.shards, self.shard_of[numbers], self._row_of[numbers])

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths of all groups."""
        first, second = self.column("first"), self.column("second")
        both = np.stack([first, second], axis=1)
        return Lengths(self.column("prompt"), both[both > 0], starts_of(1 + (second > 0)))

    def __len__(self) -> int:
        return len(self._row_of)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Groups: ...
    def __getitem__(self, index: int | slice) -> Group | Groups:
        if isinstance(index, slice):
            return Groups(self.shards, self.shard_of[index], self._row_of[index])
        shard: Shard = self.shards[int(self.shard_of[index])]
        return shard.group(int(self._row_of[index]))

    def __iter__(self) -> Iterator[Group]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Group.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def column(self, name: str) -> np.ndarray:
        """A column of the rows, in their order."""
        out: np.ndarray | None = None
        for n, shard in enumerate(self.shards):
            here = self.shard_of == n
            if not here.any():
                continue
            values = shard.column(name)
            if out is None:
                out = np.zeros((len(self), *values.shape[1:]), values.dtype)
            out[here] = values[self._row_of[here]]
        return out if out is not None else self.shards[0].column(name)[:0]
