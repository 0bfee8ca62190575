"""A log of JSON lines as columns of numbers. Floor 2.

In: a file with one object per line. Out: numpy arrays. Blocks of the file go through pyarrow's parser, which reads a
million lines in seconds; a block that it refuses (a damaged line, a bare NaN) is read line by line in Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from strop.durable import json_object
from strop.readable import is_number

Column = NDArray[np.float64]

BLOCK = 1 << 22
"""Bytes that are parsed at a time."""
PARTS, LEAST_PART = 4, 1 << 20
"""A block is parsed in so many parts at once, by as many threads as pyarrow has; a part has at least so many bytes."""
LARGE = 1 << 26
"""Bytes. Of a larger file, numbers are held as float32: they are drawn and compared, not trained with."""
NESTED = re.compile(rb"\[\s*\[")
MOST_WORDS = 4096
"""At most this many different texts of the text column are known; a line with a further one counts as one without."""


@dataclass(frozen=True)
class Lines:
    """columns: name -> [n] numbers, NaN where a line has none (or a null). words: [n] the value of the one column of
    text that was asked for, as places in `vocabulary`; -1 where there is none. num_damaged: lines that are no JSON
    object."""

    columns: Mapping[str, Column]
    words: NDArray[np.int32]
    vocabulary: tuple[str, ...]
    num_damaged: int

    def __len__(self) -> int:
        return len(self.words)

    def where(self, word: str) -> NDArray[np.bool_]:
        """[n] lines whose text is this one."""
        if word not in self.vocabulary:
            return np.zeros(len(self), bool)
        return np.asarray(self.words == self.vocabulary.index(word))


class _Gathered:
    """The lines of the blocks that were read so far."""

    def __init__(self, numbers: Collection[str], text: str | None, dtype: type) -> None:
        self.numbers, self.text, self.dtype = numbers, text, dtype
        fields = [(name, pa.float64()) for name in numbers] + ([(text, pa.string())] if text else [])
        self.parsing = pa.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
        self.parts: dict[str, list[tuple[int, np.ndarray]]] = {}
        self.words: list[np.ndarray] = []
        self.vocabulary: dict[str, int] = {}
        self.num_lines = self.num_damaged = 0

    def parse(self, block: bytes) -> None:
        """A block of whole lines.

        Raises:
            pyarrow.ArrowException, ValueError: one of them is no object of the kind that is expected.
        """
        if not is_flat(block):
            raise ValueError("not one flat object per line")
        options = pa.json.ReadOptions(block_size=max(len(block) // PARTS + 1, LEAST_PART))
        self.add_table(pa.json.read_json(BytesIO(block), read_options=options, parse_options=self.parsing))

    def add(self, num: int, columns: Mapping[str, np.ndarray], words: np.ndarray) -> None:
        for name, values in columns.items():
            self.parts.setdefault(name, []).append((self.num_lines, values.astype(self.dtype)))
        self.words.append(words.astype(np.int32))
        self.num_lines += num

    def place_of(self, word: str) -> int:
        """In the vocabulary, which grows by a new word; -1 where it is full."""
        if word not in self.vocabulary and len(self.vocabulary) >= MOST_WORDS:
            return -1
        return self.vocabulary.setdefault(word, len(self.vocabulary))

    def add_table(self, found: Any) -> None:
        """A block as pyarrow has it."""
        words = np.full(found.num_rows, -1, np.int32)
        columns: dict[str, np.ndarray] = {}
        for name, column in zip(found.column_names, found.columns, strict=True):
            if name == self.text:
                encoded = column.combine_chunks().dictionary_encode()
                known = np.array([self.place_of(w) for w in encoded.dictionary.to_pylist()] + [-1], np.int32)
                words = known[encoded.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)]
            elif column.null_count < found.num_rows:
                columns[name] = column.combine_chunks().to_numpy(zero_copy_only=False)  # that of chunks imports pandas
        self.add(found.num_rows, columns, words)

    def parse_by_line(self, block: bytes) -> None:
        """A block of which some lines may be damaged."""
        records = [json_object(line) for line in block.splitlines() if line.strip()]
        good = [r for r in records if r is not None]
        self.num_damaged += len(records) - len(good)
        columns = {
            name: np.array([_number(r.get(name)) for r in good], float)
            for name in self.numbers
            if any(is_number(r.get(name)) for r in good)
        }
        words = [self.place_of(w) if isinstance(w := r.get(self.text or ""), str) else -1 for r in good]
        self.add(len(good), columns, np.array(words, np.int32))

    def whole(self) -> Lines:
        columns = {}
        for name in list(self.parts):
            column: np.ndarray = np.full(self.num_lines, np.nan, self.dtype)
            for start, values in self.parts.pop(name):
                column[start : start + len(values)] = values
            columns[name] = column
        words = np.concatenate(self.words) if self.words else np.zeros(0, np.int32)
        return Lines(columns, words, tuple(self.vocabulary), self.num_damaged)


def read_lines(path: Path, numbers: Collection[str], *, text: str | None = None) -> Lines:
    """All lines of a file. A last line that a crash cut short counts as one damaged line.

    Args:
        numbers: names of the columns of numbers to read.
        text: name of the one column of text to read, if any.

    Raises:
        OSError: the file cannot be read.
    """
    gathered = _Gathered(numbers, text, np.float32 if path.stat().st_size > LARGE else np.float64)
    for block in _blocks(path):
        if block.isspace():
            continue
        try:
            gathered.parse(block)
        except (pa.ArrowException, ValueError, KeyError):
            gathered.parse_by_line(block)
    return gathered.whole()


def is_flat(block: bytes) -> bool:
    """Whether every line is between one pair of braces, with no list in a list: what logs have. pyarrow's parser ends
    the whole process at a line that is `null`, and at brackets nested some ten thousand deep."""
    text = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    begins = np.concatenate([[0], ends[:-1] + 1])
    braces = [int(np.count_nonzero(text == ord(brace))) for brace in "{}"]
    framed = bool((text[begins] == ord("{")).all() and (text[ends - 1] == ord("}")).all())
    return framed and braces == [len(ends), len(ends)] and not (b"[" in block and NESTED.search(block))


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks that end with a line's end, but for the last. A line that is longer than a block, which no log
    has, comes in pieces."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block + file.readline(BLOCK)


def _number(value: object) -> float:
    if not is_number(value):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
