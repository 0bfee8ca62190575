"""Preference files for other tools: JSON Lines in, a `datasets.Dataset` out. Floor 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from strop.data.read.files import jsonl_rows, read_jsonl
from strop.data.read.row import Row, RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.errors import DataError
from strop.types import Turns

if TYPE_CHECKING:
    import datasets


def load_preference_jsonl(path_or_file: str | Path | IO[bytes] | IO[str]) -> datasets.Dataset:
    """Preference rows as a data set with the columns prompt, chosen and rejected.

    Rows are validated as for training. Texts stay texts; as soon as one row holds messages, all rows become lists of
    messages, since a column has one type. A prompt inside chosen and rejected is split off.

    Raises:
        DataError: the file cannot be read or is empty, or a row is bad (with its line).
    """
    # datasets takes a second to import
    import datasets

    examples = []
    for row in _rows(path_or_file):
        if row.refusal is not None:
            raise row.refusal.at(row.origin)
        if row.data is not None:
            try:
                examples.append(to_example(row.data, row.origin, "pair", RowColumns()))
            except RowRefused as refusal:
                raise refusal.at(row.origin) from refusal
    if not examples:
        raise DataError("there are no rows", where=_label(path_or_file), expected="at least one preference row")
    texts = all(isinstance(example.prompt, str) for example in examples)
    columns: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for example in examples:
        sides = zip(columns, ("user", "assistant", "assistant"), (example.prompt, *example.completions), strict=True)
        for column, role, turns in sides:
            columns[column].append(turns if texts else _messages(turns, role))
    return datasets.Dataset.from_dict(columns)


def _messages(turns: Turns, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else [dict(turn) for turn in turns]


def _label(path_or_file: str | Path | IO[bytes] | IO[str]) -> str:
    return str(path_or_file if isinstance(path_or_file, str | Path) else getattr(path_or_file, "name", "the open file"))


def _rows(path_or_file: str | Path | IO[bytes] | IO[str]) -> Iterator[Row]:
    if isinstance(path_or_file, str | Path):
        return read_jsonl(str(path_or_file))
    return jsonl_rows(_lines(path_or_file), _label(path_or_file))


def _lines(file: IO[bytes] | IO[str]) -> Iterator[bytes]:
    for line in file:
        yield line if isinstance(line, bytes) else line.encode("utf-8", errors="surrogatepass")
