"""A log of JSON lines as columns of numbers. Floor 2.

In: a file with one object a line. Out: numpy arrays. Blocks of the file go through pyarrow's parser, which reads a
million lines in seconds; a block that it refuses (a damaged line, a bare NaN) is read line by line in Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

Column = NDArray[np.float64]

BLOCK = 1 << 24
"""Bytes that are parsed at a time."""
LARGE = 1 << 26
"""Bytes of a file from which on numbers are kept with 24 bits: they are drawn and compared, not trained with."""
MOST_COLUMNS = 96
LONGEST_NAME = 80
MOST_WORDS = 4096
"""Different texts of the text column that are kept apart; further ones count as damage."""


@dataclass(frozen=True)
class Lines:
    """columns: name -> [n] numbers, NaN where a line has none (or a null). words: [n] the value of the one column of
    text that was asked for, as places in `vocabulary`; -1 where there is none. num_damaged: lines that are no JSON
    object. num_unread: names of columns that are too long or too many."""

    columns: Mapping[str, Column]
    words: NDArray[np.int32]
    vocabulary: tuple[str, ...]
    num_damaged: int
    num_unread: int

    def __len__(self) -> int:
        return len(self.words)

    def where(self, word: str) -> NDArray[np.bool_]:
        """[n] lines whose text is this one."""
        if word not in self.vocabulary:
            return np.zeros(len(self), bool)
        return np.asarray(self.words == self.vocabulary.index(word))


class _Gathered:
    """Blocks, as they come."""

    def __init__(self, text: str | None, only: Collection[str] | None, dtype: type) -> None:
        self.text, self.only, self.dtype = text, only, dtype
        self.parts: dict[str, list[tuple[int, np.ndarray]]] = {}
        self.words: list[np.ndarray] = []
        self.vocabulary: dict[str, int] = {}
        self.num_lines = self.num_damaged = 0
        self.unread: set[str] = set()

    def is_wanted(self, name: str) -> bool:
        if self.only is not None:
            return name in self.only
        if len(name) > LONGEST_NAME or (name not in self.parts and len(self.parts) >= MOST_COLUMNS):
            self.unread.add(name[:LONGEST_NAME])
            return False
        return True

    def add(self, num: int, columns: Mapping[str, np.ndarray], words: np.ndarray) -> None:
        for name, values in columns.items():
            self.parts.setdefault(name, []).append((self.num_lines, values.astype(self.dtype)))
        self.words.append(words)
        self.num_lines += num

    def number_of(self, word: str) -> int:
        if word not in self.vocabulary and len(self.vocabulary) >= MOST_WORDS:
            return -1
        return self.vocabulary.setdefault(word, len(self.vocabulary))

    def table(self, found: Any) -> None:
        """A block as pyarrow has it."""
        words = np.full(found.num_rows, -1, np.int32)
        columns: dict[str, np.ndarray] = {}
        for name, column in zip(found.column_names, found.columns, strict=True):
            kind = column.type
            if name == self.text and pa.types.is_string(kind):
                encoded = column.combine_chunks().dictionary_encode()
                known = np.array([self.number_of(w) for w in encoded.dictionary.to_pylist()] + [-1], np.int32)
                places = encoded.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)
                words = known[places]
            elif (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and self.is_wanted(name):
                columns[name] = column.cast(pa.float64()).to_numpy()
            elif pa.types.is_null(kind) and self.is_wanted(name):
                columns[name] = np.full(found.num_rows, np.nan)
        self.add(found.num_rows, columns, words)

    def objects(self, block: bytes) -> None:
        """The same, line by line."""
        records = [r for line in block.splitlines() if line.strip() for r in [_object(line)]]
        good = [r for r in records if r is not None]
        self.num_damaged += len(records) - len(good)
        names = dict.fromkeys(name for r in good for name, value in r.items() if value is None or _is_number(value))
        columns = {
            name: np.array([_number(r.get(name)) for r in good], float) for name in names if self.is_wanted(name)
        }
        words = [self.number_of(w) if isinstance(w := r.get(self.text or ""), str) else -1 for r in good]
        self.add(len(good), columns, np.array(words, np.int32))

    def whole(self) -> Lines:
        columns = {}
        for name in list(self.parts):
            column: np.ndarray = np.full(self.num_lines, np.nan, self.dtype)
            for start, values in self.parts.pop(name):
                column[start : start + len(values)] = values
            columns[name] = column
        words = np.concatenate(self.words) if self.words else np.zeros(0, np.int32)
        return Lines(columns, words, tuple(self.vocabulary), self.num_damaged, len(self.unread))


def read_lines(path: Path, *, text: str | None = None, only: Collection[str] | None = None) -> Lines:
    """All lines of a file. text: name of the one column of text that is kept. only: names of the columns of numbers
    that are; default all. What a crash cut short at the end of the file is damage of one line.

    Raises:
        OSError: the file cannot be read.
    """
    gathered = _Gathered(text, only, np.float32 if path.stat().st_size > LARGE else np.float64)
    for block in _blocks(path):
        try:
            options = pa.json.ReadOptions(block_size=max(len(block) + 1, 1024))
            gathered.table(pa.json.read_json(BytesIO(block), read_options=options))
        except (pa.ArrowException, ValueError, KeyError):
            gathered.objects(block)
    return gathered.whole()


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks that end with a line's end, but for the last."""
    with path.open("rb") as file:
        rest = b""
        while more := file.read(BLOCK):
            whole, newline, rest_of = more.rpartition(b"\n")
            if not newline:
                rest += more
                if len(rest) > 4 * BLOCK:  # no line of a log is that long
                    rest = b""
                continue
            block = rest + whole + newline
            rest = rest_of
            if block.strip():
                yield block
        if rest.strip():
            yield rest


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    if not _is_number(value):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.nan
