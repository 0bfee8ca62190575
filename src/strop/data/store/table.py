"""Groups on disk: one Arrow file per source, memory-mapped, and views of it that look like lists of groups. Floor 2.

In: encoded rows. Out: groups by index, built when they are asked for. In memory stay a few numbers per row (its place
and its lengths); the tokens stay in the file, and the operating system keeps of it what is used.

One row of the table is one group: ids (the prompt, then its completions), one byte an id (1 = trained), the prompt's
length, the origin, what was done to the row, and hashes by which rows are compared: of the prompt's words, of its
tokens (`prompt_key`), of each completion's tokens, and of all of them. What every completion has of its own
(`PER_COMPLETION`) stands in lists, one entry per completion; so do the numbers of the row (`NUMBERS`), in empty lists
where it has none. Where rewards will read them, the row's columns and the turns of its prompt stand there as JSON
(`KeptRow`).
"""

from __future__ import annotations

import hashlib
import json
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
from strop.lengths import (
    CHUNK,
    Keys,
    Lengths,
    completion_key,
    hash_of,
    little_endian,
    prompt_key,
    starts_of,
    taken_ragged,
)
from strop.types import NUMBERS, Completion, Group, Origin

PER_COMPLETION = {"completions": pa.int32(), "scored": pa.int32(), "hashes": pa.uint64()}
"""Of every completion: its tokens, how many of them are trained, and its key (`completion_key`)."""

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.binary()),
        ("prompt", pa.int32()),
        *((name, pa.list_(kind)) for name, kind in PER_COMPLETION.items()),
        ("label", pa.int32()),
        ("again", pa.int32()),
        ("line", pa.int64()),
        ("file", pa.int32()),
        *((name, pa.int32()) for name in COUNTERS),
        ("raw", pa.int32()),
        ("prompt_hash", pa.uint64()),
        ("prompt_key", pa.uint64()),
        ("digest", pa.binary(16)),
        ("kept", pa.string()),
        *((name, pa.list_(pa.float64())) for name in NUMBERS),
    ]
)


@dataclass(frozen=True, slots=True)
class Record:
    """A group with what was done to its row.

    prompt_words: what rows with one prompt share. file: number of the origin's file in the source. again: 1 for the
    second group of one row (a pair that labelled groups are made of); what is counted by rows is counted at the first.
    kept: the row as JSON, where it is kept.
    """

    group: Group
    file: int
    prompt_words: bytes
    counts: Mapping[str, int] = field(default_factory=dict)
    raw: int = 0
    again: int = 0
    kept: str | None = None


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A row as rewards see it. columns: by name, as they were read; dates and binary values are texts. prompt: the
    turns of a conversation, a text, or None where the row was given as tokens. tools: the tool schemas of the row."""

    columns: Mapping[str, Any]
    prompt: list[Mapping[str, Any]] | str | None
    tools: list[Mapping[str, Any]] | None = None

    @classmethod
    def from_json(cls, text: str) -> KeptRow:
        return cls(*json.loads(text))

    def to_json(self) -> str:
        return json.dumps([self.columns, self.prompt, self.tools], default=str)


def to_table(records: Sequence[Record]) -> Any:
    """The records as a record batch."""
    groups = [record.group for record in records]
    columns: dict[str, Any] = {
        **_tokens(groups),
        **_of_completions(groups),
        "prompt": [len(g.prompt_ids) for g in groups],
        "label": [-1 if g.label is None else int(g.label) for g in groups],
        "line": [g.origin.line for g in groups],
        "file": [record.file for record in records],
        **{name: [int(record.counts.get(name, 0)) for record in records] for name in COUNTERS},
        "raw": [int(record.raw) for record in records],
        "again": [record.again for record in records],
        "prompt_hash": [hash_of(record.prompt_words) for record in records],
        "prompt_key": [prompt_key(g.prompt_ids) for g in groups],
        "digest": [_digest(record.group, record.kept) for record in records],
        "kept": [record.kept for record in records],
        **{name: [g.numbers.get(name, ()) for g in groups] for name in NUMBERS},
    }
    return pa.record_batch([pa.array(columns[f.name], type=f.type) for f in SCHEMA], schema=SCHEMA)


def _tokens(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Ids of the prompt and of its completions one behind the other, and as many bytes that say what is trained."""
    ids, masks = [], []
    for group in groups:
        ids.append(np.concatenate([_array(group.prompt_ids), *(_array(c.ids) for c in group.completions)]))
        masks.append(bytes(len(group.prompt_ids)) + b"".join(c.loss_mask for c in group.completions))
    return {"ids": ids, "mask": masks}


def _of_completions(groups: Sequence[Group]) -> dict[str, list[list[int]]]:
    return {
        "completions": [[len(c.ids) for c in g.completions] for g in groups],
        "scored": [[c.num_scored for c in g.completions] for g in groups],
        "hashes": [[completion_key(c) for c in g.completions] for g in groups],
    }


def _array(ids: array[int]) -> np.ndarray:
    return np.frombuffer(ids, dtype=np.int32)


def _digest(group: Group, kept: str | None) -> bytes:
    """Of the ids, masks, label, numbers and kept row alone: the same ones give the same, wherever they were read."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(little_endian(array("i", [len(group.prompt_ids), *(len(c.ids) for c in group.completions)])))
    digest.update(little_endian(group.prompt_ids))
    if group.label is not None:
        digest.update(bytes([group.label]))
    for completion in group.completions:
        digest.update(little_endian(completion.ids) + completion.loss_mask)
    for name, numbers in sorted(group.numbers.items()):
        digest.update(name.encode() + little_endian(numbers))
    digest.update((kept or "").encode())
    return digest.digest()


class Shard:
    """The groups of one source, in a memory-mapped Arrow file.

    Args:
        files: names of the files that origins point to.
    """

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.parts = [_Part(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self.starts = np.array([0, *accumulate(len(part) for part in self.parts)])
        self._bounds = self.starts.tolist()
        self.files = tuple(files)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def sum(self, name: str) -> int:
        """Over all rows, of a column with one number per row."""
        return sum(int(part.column(name).sum()) for part in self.parts)

    def group(self, row: int) -> Group:
        n = bisect_right(self._bounds, row) - 1
        return self.parts[n].group(row - self._bounds[n], self.files)

    def kept(self, row: int) -> KeptRow:
        """The row itself, where it was kept."""
        n = bisect_right(self._bounds, row) - 1
        return self.parts[n].kept(row - self._bounds[n])


class _Part:
    """One record batch as arrays that lie in the file."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        ids, mask = batch.column(0), batch.column(1)
        n = batch.num_rows + 1
        self._id_stops = np.frombuffer(ids.buffers()[1], np.int32, n)
        self._ids = ids.values.to_numpy(zero_copy_only=True)
        self._mask_stops = np.frombuffer(mask.buffers()[1], np.int32, n)
        self._mask = mask.buffers()[2]
        self._numbers = [self.column(name) for name in ("prompt", "line", "file", "label")]
        self._lengths, self._starts = self.ragged("completions")
        numbers = {name: self.ragged(name) for name in NUMBERS}
        self._beside = {name: found for name, found in numbers.items() if len(found[0])}

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def column(self, name: str) -> np.ndarray:
        """[rows] numbers, or [rows, 16] bytes of `digest`."""
        found = self._batch.column(SCHEMA.get_field_index(name))
        if name == "digest":
            return np.frombuffer(found.buffers()[1], np.uint8, 16 * len(self)).reshape(-1, 16)
        return np.asarray(found.to_numpy())

    def kept(self, row: int) -> KeptRow:
        text = self._batch.column(SCHEMA.get_field_index("kept"))[row].as_py()
        assert text is not None, "rows are kept where the configuration samples"
        return KeptRow.from_json(text)

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """([completions] numbers, [rows + 1] where those of each row begin)."""
        found = self._batch.column(SCHEMA.get_field_index(name))
        return found.values.to_numpy(), np.frombuffer(found.buffers()[1], np.int32, len(self) + 1)

    def group(self, row: int, files: Sequence[str]) -> Group:
        prompt, line, file, label = (int(column[row]) for column in self._numbers)
        start, stop, mask_start = int(self._id_stops[row]), int(self._id_stops[row + 1]), int(self._mask_stops[row])
        ids = array("i")
        ids.frombytes(self._ids[start:stop].tobytes())
        mask = self._mask[mask_start : mask_start + len(ids)].to_pybytes()
        lengths = self._lengths[self._starts[row] : self._starts[row + 1]].tolist()
        completions = tuple(Completion(ids[a:b], mask[a:b]) for a, b in pairwise(accumulate(lengths, initial=prompt)))
        beside = {}
        for name, (values, starts) in self._beside.items():
            if starts[row + 1] > starts[row]:
                beside[name] = array("d", values[starts[row] : starts[row + 1]].tobytes())
        return Group(ids[:prompt], completions, Origin(files[file], line), None if label < 0 else bool(label), beside)


class Groups(Sequence[Group]):
    """Rows of shards as a sequence of groups.

    Args:
        shard_of, row_of: for each group, its shard and its row there.
    """

    def __init__(self, shards: Sequence[Shard], shard_of: np.ndarray, row_of: np.ndarray) -> None:
        one = np.broadcast_to(np.int16(0), np.shape(row_of))  # takes no memory
        self.shards, self.shard_of, self._row_of = tuple(shards), one if len(shards) == 1 else shard_of, row_of

    @classmethod
    def of(cls, shard: Shard) -> Groups:
        """All rows of a shard."""
        rows = np.arange(len(shard), dtype=np.int32 if len(shard) < 2**31 else np.int64)
        return cls([shard], np.zeros(len(shard), np.int16), rows)

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
        """The lengths of all groups, 16 bytes per pair."""
        completions, starts = self.ragged("completions")
        small = np.int32 if len(completions) < 2**31 else np.int64
        return Lengths(self.column("prompt"), completions, starts.astype(small))

    def keyed(self, numbers: np.ndarray) -> Keys:
        """Keys of the groups of these numbers, in this order."""
        some = self.taken(numbers)
        (scored, _), (completions, _) = some.ragged("scored"), some.ragged("hashes")
        return Keys(some.lengths, scored, some.column("prompt_key"), completions)

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

    def chunks(self) -> Iterator[Groups]:
        """The same groups, `CHUNK` at a time."""
        return (self[start : start + CHUNK] for start in range(0, len(self), CHUNK))

    def kept(self, index: int) -> KeptRow:
        """The row of a group, where rows were kept for rewards."""
        return self.shards[int(self.shard_of[index])].kept(int(self._row_of[index]))

    def column(self, name: str) -> np.ndarray:
        """A column with one number (or digest) per row, in the order of the rows."""
        out: np.ndarray | None = None
        for where, part, rows in self._by_part():
            values = part.column(name)
            if out is None:
                out = np.empty((len(self), *values.shape[1:]), values.dtype)
            out[where] = values[rows]
        return np.zeros(0, np.int64) if out is None else out

    def sum(self, name: str) -> int:
        """Over all rows, of a column with one number per row."""
        return sum(int(part.column(name)[rows].sum()) for _, part, rows in self._by_part())

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of `PER_COMPLETION`: its numbers row after row, and [rows + 1] where those of each row begin."""
        counts = self.counts(name)
        starts = starts_of(counts)
        out: np.ndarray | None = None
        for where, part, rows in self._by_part():
            values, own_starts = part.ragged(name)
            if out is None:
                out = np.empty(int(starts[-1]), values.dtype)
            own, first = counts[where], starts[:-1][where]
            places = np.arange(int(own.sum())) + np.repeat(first - starts_of(own)[:-1], own)
            out[places] = taken_ragged(values, own_starts, rows)
        return np.zeros(0, np.int64) if out is None else out, starts

    def counts(self, name: str) -> np.ndarray:
        """[rows] how many numbers of `PER_COMPLETION` or `NUMBERS` each row has."""
        counts = np.empty(len(self), np.int32)
        for where, part, rows in self._by_part():
            counts[where] = np.diff(part.ragged(name)[1])[rows]
        return counts

    def _by_part(self) -> Iterator[tuple[Any, _Part, np.ndarray]]:
        """(which of these groups, the record batch that they are in, their rows there), for each that has some."""
        for n, shard in enumerate(self.shards):
            here = slice(None) if len(self.shards) == 1 else np.flatnonzero(self.shard_of == n)
            rows = self._row_of[here]
            in_order = bool((rows[1:] >= rows[:-1]).all())
            order = None if in_order else np.argsort(rows, kind="stable")
            ordered = rows if order is None else rows[order]
            bounds = np.searchsorted(ordered, shard.starts).tolist()
            for part, start, (a, b) in zip(shard.parts, shard.starts.tolist(), pairwise(bounds), strict=False):
                if a == b:
                    continue
                own = slice(a, b) if order is None else order[a:b]
                yield own if isinstance(here, slice) else here[own], part, ordered[a:b] - start
