"""Tokenised sources on disk, which later runs reuse. Floor 2.

In: everything that decides the tokens (rows, tokenizer, template, limits, code), and a function that makes the table.
Out: a Tokenised, read from the cache folder or made now. An entry is a folder that is complete or absent: it is written
under another name and renamed, under a lock, so that of several runs at once only one makes it. A damaged entry is made
again. The folder is $STROP_CACHE, or ~/.cache/strop, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from strop.cachedir import cache_folder
from strop.data.store.row_pipeline import PipelineResult
from strop.data.store.table import SCHEMA, Shard
from strop.disk import remedy
from strop.errors import DataError

log = logging.getLogger("strop")

TABLE, REJECTED, ENTRY = "rows.arrow", "rejected.jsonl", "entry.json"
ROWS_A_BATCH, TOKENS_A_BATCH = 8192, 1 << 24
CHUNK = 1 << 23
TRIES = 3


@dataclass(frozen=True)
class Tokenised:
    """One source as tokens.

    refused, dropped: counts by reason. rejected: what rejected.jsonl holds, read when asked for.
    """

    shard: Shard
    refused: Counter[str]
    dropped: Counter[str]
    blank_lines: int
    rejected: Rejected


class Rejected(Sequence[Mapping[str, Any]]):
    """Refused rows: file, line, reason, raw. They lie on disk, for there can be many, and can be read as long as this
    is there, whoever deletes the file."""

    def __init__(self, parts: Sequence[tuple[_Kept, int, Mapping[str, str]]]) -> None:
        self._parts = tuple(parts)

    def __add__(self, other: Rejected) -> Rejected:
        return Rejected(self._parts + other._parts)

    def __len__(self) -> int:
        return sum(n for _, n, _ in self._parts)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for content, _, names in self._parts:
            for line in content.lines():
                row = json.loads(line)
                yield {**row, "file": names.get(row["file"], row["file"])}

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def fetch(
    identity: Mapping[str, Any], label: str, make: Callable[[], Iterator[tuple[str, PipelineResult]]], *, strict: bool
) -> Tokenised:
    """The tokens of a source, from the cache or made now.

    Args:
        label: what the source is called now; the same rows may have had another name when they were tokenised.
        make: works on the rows of the source.
        strict: rows that are refused are an error, which `make` raises.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:40]
    for left in reversed(range(TRIES)):
        folder = cache_folder("tokens") / key[:2]
        try:
            return _fetch(folder / key, label, make, strict)
        except FileNotFoundError as error:
            if not left:
                raise DataError(
                    f"the token cache was deleted while it was used, {TRIES} times",
                    where=str(folder),
                    fix="leave it alone while a run starts, or set STROP_CACHE to another folder",
                ) from error
            log.warning("%s was deleted while it was used: the rows are tokenised again", folder)
        except OSError as error:
            why = error.strerror or str(error)
            raise DataError(
                f"the token cache cannot be written: {why}",
                where=str(folder),
                expected="room and leave to write; tokens take some 5 bytes each",
                fix=f"{remedy(why)}, or set the environment variable STROP_CACHE to another folder",
            ) from error
    raise AssertionError("the last try returns or raises")


def _fetch(
    place: Path, label: str, make: Callable[[], Iterator[tuple[str, PipelineResult]]], strict: bool
) -> Tokenised:
    """The entry at `place`, its files open: from here on it may be deleted."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(place) + ".lock"):
        entry = _read(place)
        if entry is None or (strict and entry["refused"]):
            entry = _write(place, label, make)
        names = {entry["label"]: label}
        shard = Shard(place / TABLE, [names.get(name, name) for name in entry["files"]])
        rejected = Rejected([(_Kept(place / REJECTED), sum(entry["refused"].values()), names)])
    return Tokenised(shard, Counter(entry["refused"]), Counter(entry["dropped"]), entry["blank_lines"], rejected)


class _Kept:
    """A file that can be read as long as this is there, whoever deletes it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._fd)

    def lines(self) -> Iterator[bytes]:
        position, rest = 0, b""
        while True:
            os.lseek(self._fd, position, os.SEEK_SET)  # others may read between two lines
            chunk = os.read(self._fd, CHUNK)
            if not chunk:
                return
            position += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole


def _read(place: Path) -> dict[str, Any] | None:
    """The entry, if it is there and whole."""
    try:
        entry: dict[str, Any] = json.loads((place / ENTRY).read_bytes())
        whole = all(checksum_of(place / name) == entry["checksums"][name] for name in (TABLE, REJECTED))
        whole = whole and entry.pop("checksum") == _of_json(entry)
    except FileNotFoundError:
        if place.exists():
            log.warning("%s is not whole: its rows are tokenised again", place)
        return None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s is damaged: its rows are tokenised again", place)
        return None
    return entry


def _of_json(entry: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def checksum_of(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _write(place: Path, label: str, make: Callable[[], Iterator[tuple[str, PipelineResult]]]) -> dict[str, Any]:
    for unfinished in place.parent.glob(f"{place.name}-*"):
        shutil.rmtree(unfinished)  # of a run that was killed; the lock says that nobody is at it
    new = Path(tempfile.mkdtemp(prefix=f"{place.name}-", dir=place.parent))
    try:
        entry = _fill(new, label, make)
        entry["checksums"] = {name: checksum_of(new / name) for name in (TABLE, REJECTED)}
        (new / ENTRY).write_text(json.dumps({**entry, "checksum": _of_json(entry)}), encoding="utf-8")
        if place.exists():
            shutil.rmtree(place)
        new.rename(place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return entry


def _fill(new: Path, label: str, make: Callable[[], Iterator[tuple[str, PipelineResult]]]) -> dict[str, Any]:
    refused, dropped, blank, good = Counter[str](), Counter[str](), 0, 0
    files: list[str] = []
    first: tuple[str, Mapping[str, str]] | None = None
    with (
        pa.OSFile(str(new / TABLE), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        (new / REJECTED).open("w", encoding="utf-8") as rejected,
    ):
        table = _Writer(writer)
        for file, done in make():
            if done.error is not None:
                raise done.error
            if file not in files:
                files.append(file)
            refused += done.refused
            dropped += done.dropped
            blank += done.blank_lines
            good += done.num_good
            first = first or (done.first_refusal and (file, done.first_refusal)) or None
            rejected.writelines(json.dumps(row) + "\n" for row in done.rejected)
            if done.table is not None:
                table.add(done.table)
        table.flush()
    if not good:
        raise _nothing_read(refused, first, label)
    return {"label": label, "files": files, "refused": refused, "dropped": dropped, "blank_lines": blank}


class _Writer:
    """Writes small record batches as large ones: fewer parts to look through later."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._held, self._rows, self._tokens = writer, list[Any](), 0, 0

    def add(self, table: Any) -> None:
        self._held.append(table)
        self._rows += table.num_rows
        self._tokens += len(table.column(0).values)
        if self._rows >= ROWS_A_BATCH or self._tokens >= TOKENS_A_BATCH:
            self.flush()

    def flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_batches(self._held).combine_chunks())
        self._held, self._rows, self._tokens = [], 0, 0


def _nothing_read(refused: Counter[str], first: tuple[str, Mapping[str, str]] | None, label: str) -> DataError:
    if first is None:
        return DataError(
            "there are no rows", where=label, expected="at least one row", fix="name a file that has some, or fill it"
        )
    file, refusal = first
    reasons = ", ".join(f"{n} {reason}" for reason, n in refused.most_common())
    return DataError(
        f"all {refused.total()} rows are bad ({reasons}); the first: {refusal['found']}",
        where=f"{file}:{refusal['where']}",
        expected=refusal["expected"],
        fix=refusal["fix"] or f"look at the rows of {label}; docs/data.md shows the known shapes",
    )
