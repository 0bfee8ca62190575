"""Turns files of rows into split files for training and validation, checked and without duplicates. Floor 2.

In: files of rows in any format. Out: training and validation files in a folder, each row as it was read, and
`statistics.json`; refused rows go to `rejected.jsonl`, with credentials masked. Either all files are written
completely, or none. The seed and the order of the rows decide which row goes where; rows with the same prompt stay
together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from strop.config.methods import METHODS
from strop.data.data_report import length_summary
from strop.data.read.row import Row, RowRefused
from strop.data.read.sources import SPLIT_FILES, file_source
from strop.data.shapes.examples import RowColumns, to_example
from strop.data.shapes.messages import as_turns
from strop.data.split import held_out
from strop.data.text.token_rows import is_tokenised, is_tokenised_group
from strop.durable import published
from strop.errors import DataError
from strop.types import NUMBERS, Example, Origin, RowShape

_SUMS = [(a, b) for a in range(1, 6) for b in range(1, 9)]
EXAMPLES: Mapping[RowShape, Sequence[Mapping[str, Any]]] = {
    "single": [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": f"{a + b}."},
            ]
        }
        for a, b in _SUMS
    ],
    "pair": [
        {"prompt": f"What is {a} + {b}?", "chosen": f"{a + b}.", "rejected": f"It could be {a + b + 1}, I think."}
        for a, b in _SUMS
    ],
    "labelled": [
        {"prompt": f"What is {a} + {b}?", "completion": f"{a + b + (a + b) % 2}.", "label": (a + b) % 2 == 0}
        for a, b in _SUMS
    ],
    "group": [
        {
            "prompt": f"What is {a} + {b}?",
            "completions": [f"{a + b + wrong}." for wrong in (0, 1, 0, 2)],
            "rewards": [1.0, 0.0, 1.0, 0.0],
        }
        for a, b in _SUMS
    ],
}
"""Rows of `strop prepare --example`."""


@dataclass
class SplitStatistics:
    """What became of the rows. Lengths are in characters."""

    num_read: int = 0
    duplicates: int = 0
    leaks: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "refused": dict(self.refused)}

    def lines(self) -> list[str]:
        """The same in words."""
        lines = [f"{self.num_read} row{'s' * (self.num_read != 1)} read"]
        lines += [f"{n} refused: {reason}" for reason, n in self.refused.most_common()]
        lines += [f"{self.duplicates} dropped: duplicates, word for word"] if self.duplicates else []
        lines += [f"{self.leaks} left out of the validation rows: their prompt is trained on"] if self.leaks else []
        for name, facts in self.splits.items():
            length, count = facts["characters"], facts["rows"]
            long = f", {length['p50']} characters (median), {length['max']} at most" if count else ""
            lines.append(f"{name}: {count} row{'s' * (count != 1)}{long}")
        return lines


@dataclass(frozen=True)
class _Kept:
    """A row that is written: where it is in the inputs, and what it is compared by."""

    data: Mapping[str, Any]
    prompt: bytes
    length: int


def write_split_files(
    inputs: Sequence[str],
    output_dir: Path,
    rows: RowShape,
    *,
    val_inputs: Sequence[str] = (),
    val_fraction: float = 0.1,
    seed: int = 42,
    columns: RowColumns | None = None,
    keep_duplicates: bool = False,
) -> SplitStatistics:
    """Writes the split files of `inputs` (and of `val_inputs`, whose rows all become validation rows).

    Raises:
        DataError: a file cannot be read, no row is good, or the folder holds split files already.
    """
    sources, val_sources = ([file_source(name) for name in names] for names in (inputs, val_inputs))
    read = (row for source in sources for row in source.read())
    given = (row for source in val_sources for row in source.read()) if val_inputs else None
    how = _How(rows, _with_numbers(columns or RowColumns(), rows), val_fraction, seed, keep_duplicates)
    return _publish(output_dir, read, given, how, ", ".join(inputs))


def _with_numbers(columns: RowColumns, rows: RowShape) -> RowColumns:
    """With the columns of numbers that every method on such rows takes, so that wrong ones are found now."""
    taken = [settings.NUMBERS for settings in METHODS.values() if rows == settings.ROWS]
    return replace(columns, numbers=tuple(n for n in NUMBERS if taken and all(n in names for names in taken)))


@dataclass(frozen=True)
class _How:
    rows: RowShape
    columns: RowColumns
    val_fraction: float
    seed: int
    keeps_duplicates: bool


def _publish(
    output_dir: Path,
    read: Iterable[Row],
    given: Iterable[Row] | None,
    how: _How,
    label: str,
    example: tuple[str, Sequence[Mapping[str, Any]]] | None = None,
) -> SplitStatistics:
    """Writes everything beside its place, and puts it there once it is whole.

    Args:
        given: validation rows.
        example: name and rows of one more file.
    """
    names = SPLIT_FILES[how.rows]
    targets = [output_dir / name for name in (*names, "statistics.json", "rejected.jsonl")]
    if there := next((path for path in targets if path.exists()), None):
        raise DataError("the file is there already", where=str(there), fix="name another folder, or delete it")
    with _writing(output_dir), published(output_dir) as folder:
        with _Sorter(how, folder / "rejected.jsonl") as sorter:
            kept = list(sorter.good_rows(read))
            if not kept:
                raise sorter.nothing_good(label)
            held = list(sorter.good_rows(given)) if given is not None else None
        parts = _split(kept, held, how, result := sorter.result)
        for name, part in zip(names, parts, strict=True):
            lengths = length_summary(Counter(row.length for row in part))
            result.splits[name] = {"rows": len(part), "characters": lengths}
            _write(folder / name, (row.data for row in part))
        if example is not None:
            _write(folder / example[0], example[1])
        (folder / "statistics.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    return result


def _split(
    kept: Sequence[_Kept], given: Sequence[_Kept] | None, how: _How, result: SplitStatistics
) -> tuple[Sequence[_Kept], Sequence[_Kept]]:
    """Rows to train and to evaluate on."""
    if given is not None:
        trained = {row.prompt for row in kept}
        held = [row for row in given if row.prompt not in trained]
        result.leaks = len(given) - len(held)
        return kept, held
    prompts = np.array([int.from_bytes(row.prompt[:8], "little") for row in kept], np.uint64)
    flags = held_out(prompts, how.val_fraction, how.seed)
    train, held = ([row for row, flag in zip(kept, flags, strict=True) if flag == want] for want in (False, True))
    return train, held


def write_example_files(
    method: str, output_dir: Path, *, val_fraction: float = 0.1, seed: int = 42, keep_duplicates: bool = False
) -> SplitStatistics:
    """Writes the split files of a few made-up rows for a method, and the rows themselves as `example.METHOD.jsonl`.

    Raises:
        DataError: the folder holds split files already, or cannot be written to.
    """
    rows = METHODS[method].ROWS
    name, example = f"example.{method}.jsonl", EXAMPLES[rows]
    read = (Row(Origin(name, line), data) for line, data in enumerate(example, start=1))
    how = _How(rows, _with_numbers(RowColumns(), rows), val_fraction, seed, keep_duplicates)
    return _publish(output_dir, read, None, how, name, (name, example))


class _Sorter:
    """Tells good rows from others, and first ones from duplicates. Refused ones go to a file as they are met."""

    def __init__(self, how: _How, rejected: Path) -> None:
        self._how, self._path = how, rejected
        self._file: IO[str] | None = None
        self._seen: set[bytes] = set()
        self._first: tuple[Row, RowRefused] | None = None
        self.result = SplitStatistics()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def good_rows(self, rows: Iterable[Row]) -> Iterator[_Kept]:
        for row in rows:
            if row.data is None and row.refusal is None:
                continue
            self.result.num_read += 1
            kept = self._kept(row)
            if kept is not None:
                yield kept

    def nothing_good(self, label: str) -> DataError:
        """What to say where no row is good."""
        if self._first is None:
            return DataError("there are no rows", where=label, fix="docs/data.md shows the known shapes")
        row, refusal = self._first
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.result.refused.most_common())
        return DataError(
            f"no row is good ({reasons}); the first: {refusal.found}",
            where=str(row.origin),
            expected=refusal.expected,
            fix=refusal.fix or "docs/data.md shows the known shapes",
        )

    def _kept(self, row: Row) -> _Kept | None:
        shape = self._how.rows
        prompt: Any
        try:
            if row.data is None:
                assert row.refusal is not None
                raise row.refusal
            if shape == "group" and is_tokenised_group(row.data):
                prompt = row.data.get("prompt_ids")
                words = [prompt, row.data["completion_ids"]]
            elif shape == "single" and is_tokenised(row.data):
                prompt = row.data["input_ids"]
                words = [row.data["input_ids"], row.data.get("labels")]
            else:
                example = to_example(row.data, row.origin, shape, self._how.columns)
                prompt, words = as_turns(example.prompt) or example.completions[0], _words(example)
        except (RowRefused, RecursionError) as error:
            self._refuse(row, error if isinstance(error, RowRefused) else RowRefused("deep_nesting", DEEP))
            return None
        whole = _hash(words)
        if whole in self._seen and not self._how.keeps_duplicates:
            self.result.duplicates += 1
            return None
        self._seen.add(whole)
        return _Kept(row.data, _hash(prompt), len(_json(words)))

    def _refuse(self, row: Row, refusal: RowRefused) -> None:
        self.result.refused[refusal.reason] += 1
        self._first = self._first or (row, refusal)
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
        self._file.write(json.dumps(row.rejected(refusal.reason)) + "\n")


DEEP = "the row is nested too deeply to be compared"


def _words(example: Example) -> list[Any]:
    beside = [example.tools, example.label, example.template_kwargs, example.numbers]
    return [example.prompt, *example.completions, *beside]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _hash(value: Any) -> bytes:
    return hashlib.blake2b(_json(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("wb") as file:
        for row in rows:
            # what was not read cannot be written
            data = {key: value for key, value in row.items() if not isinstance(value, bytes)}
            try:
                line = json.dumps(data, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:  # half a surrogate pair, in a column that nobody reads
                line = json.dumps(data, default=str).encode()
            file.write(line + b"\n")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the files cannot be written: {error.strerror or error}", where=str(folder), fix="name another folder"
        ) from error
