"""Files into split files: read in any format, checked, without duplicates and leaks, split for ever alike. Floor 2.

In: files of rows. Out: train and validation files in a folder, each row as it was read, and `statistics.json`; refused
rows in `rejected.jsonl`. Which row goes where is a function of the seed and the rows' order; rows with one prompt stay
together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from strop.data.formats import Columns, to_example
from strop.data.report import length_summary
from strop.data.rows import Row, RowRefused
from strop.data.sources import SPLIT_FILES, file_source
from strop.data.split import held_out
from strop.data.tokens import is_tokenised
from strop.errors import ConfigError, DataError
from strop.types import Example, RowShape

HELP = """\
usage: strop prepare --input FILE ... --output-dir DIR [--method sft|dpo|kto] [options]
       strop prepare --example sft|dpo|kto --output-dir DIR

  --input FILE ...       JSON Lines, a JSON array, CSV or Parquet (jsonl:PATH, text:PATH, local:FOLDER)
  --output-dir DIR       gets train.jsonl and val.jsonl (sft), or train.dpo.jsonl and val.dpo.jsonl (dpo), ...,
                         and statistics.json; refused rows go to rejected.jsonl. It is what dataset.splits_dir names
  --method sft|dpo|kto   what the rows are for (default: sft); dpo for all that train on pairs
  --val-input FILE ...   validation rows, instead of a share of the others
  --val-fraction SHARE   share of the rows to hold out (default: 0.1)
  --seed N               what decides which (default: 42)
  --keep-duplicates      keep rows that are there before
  --prompt-column, --completion-column, --chosen-column, --rejected-column NAME
"""

SHAPES: Mapping[str, RowShape] = {"sft": "single", "dpo": "pair", "kto": "labelled"}
"""What the rows of a method are like."""

_SUMS = [(a, b) for a in range(1, 6) for b in range(1, 9)]
EXAMPLES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "sft": [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": f"{a + b}."},
            ]
        }
        for a, b in _SUMS
    ],
    "dpo": [
        {"prompt": f"What is {a} + {b}?", "chosen": f"{a + b}.", "rejected": f"It could be {a + b + 1}, I think."}
        for a, b in _SUMS
    ],
    "kto": [
        {"prompt": f"What is {a} + {b}?", "completion": f"{a + b + (a + b) % 2}.", "label": (a + b) % 2 == 0}
        for a, b in _SUMS
    ],
}
"""Rows of `strop prepare --example`."""


@dataclass
class Prepared:
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
        lines += [f"{self.duplicates} dropped: there before, word for word"] if self.duplicates else []
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


def prepare_files(
    inputs: Sequence[str],
    output_dir: Path,
    rows: RowShape,
    *,
    val_inputs: Sequence[str] = (),
    val_fraction: float = 0.1,
    seed: int = 42,
    columns: Columns | None = None,
    keep_duplicates: bool = False,
) -> Prepared:
    """Writes the split files of `inputs` (and of `val_inputs`, whose rows all become validation rows).

    Raises:
        DataError: a file cannot be read, no row is good, or the folder holds split files already.
    """
    names = SPLIT_FILES[rows]
    targets = [output_dir / name for name in (*names, "statistics.json", "rejected.jsonl")]
    if there := next((path for path in targets if path.exists()), None):
        raise DataError("the file is there already", where=str(there), fix="name another folder, or delete it")
    sorter = _Sorter(rows, columns or Columns(), keep_duplicates)
    kept = list(sorter.good_rows(inputs))
    given = list(sorter.good_rows(val_inputs))
    if not kept:
        raise DataError(
            f"no row is good: {dict(sorter.result.refused)}" if sorter.result.refused else "there are no rows",
            where=", ".join(inputs),
            fix="docs/data.md shows the known shapes",
        )
    result = sorter.result
    if val_inputs:
        trained = {row.prompt for row in kept}
        held = [row for row in given if row.prompt not in trained]
        result.leaks = len(given) - len(held)
        parts = (kept, held)
    else:
        prompts = np.array([int.from_bytes(row.prompt[:8], "little") for row in kept], np.uint64)
        flags = held_out(prompts, val_fraction, seed)
        parts = tuple([row for row, flag in zip(kept, flags, strict=True) if flag == want] for want in (False, True))  # type: ignore[assignment]
    for name, part in zip(names, parts, strict=True):
        result.splits[name] = {"rows": len(part), "characters": length_summary(np.array([r.length for r in part], int))}
    _write(output_dir, dict(zip(names, parts, strict=True)), result, sorter.rejected)
    return result


def prepare(options: Any) -> list[str]:
    """What `strop prepare` does; `options` are its flags. What became of the rows, in words.

    Raises:
        StropError: a flag is wrong, or as `prepare_files`.
    """
    if not options.output_dir:
        raise ConfigError("--output-dir is missing", fix="see strop prepare --help")
    if bool(options.input) == bool(options.example):
        found = "--input and --example are both given" if options.input else "neither --input nor --example is given"
        raise ConfigError(found, expected="one of the two", fix="see strop prepare --help")
    if not 0 <= options.val_fraction < 1:
        raise ConfigError(f"--val-fraction is {options.val_fraction}", expected="a share of at least 0 and below 1")
    method, folder = options.example or options.method, Path(options.output_dir)
    inputs = [_write_example(method, folder)] if options.example else options.input
    result = prepare_files(
        inputs,
        folder,
        SHAPES[method],
        val_inputs=options.val_input,
        val_fraction=options.val_fraction,
        seed=options.seed,
        columns=Columns(
            options.prompt_column, options.chosen_column, options.rejected_column, options.completion_column
        ),
        keep_duplicates=options.keep_duplicates,
    )
    return [*result.lines(), f"train on it with: dataset.splits_dir: {folder} and post_training.method: {method}"]


def _write_example(method: str, folder: Path) -> str:
    path = folder / f"example.{method}.jsonl"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES[method]), encoding="utf-8")
    return str(path)


class _Sorter:
    """Tells good rows from others, and first ones from duplicates."""

    def __init__(self, rows: RowShape, columns: Columns, keep_duplicates: bool) -> None:
        self._rows, self._columns, self._keeps = rows, columns, keep_duplicates
        self._seen: set[bytes] = set()
        self.result = Prepared()
        self.rejected: list[Mapping[str, Any]] = []

    def good_rows(self, inputs: Sequence[str]) -> Iterator[_Kept]:
        for name in inputs:
            for row in file_source(name).read():
                if row.data is None and row.refusal is None:
                    continue
                self.result.num_read += 1
                kept = self._kept(row)
                if kept is not None:
                    yield kept

    def _kept(self, row: Row) -> _Kept | None:
        try:
            if row.data is None:
                assert row.refusal is not None
                raise row.refusal
            if self._rows == "single" and is_tokenised(row.data):
                prompt: Any = row.data["input_ids"]
                words = [row.data["input_ids"], row.data.get("labels")]
            else:
                example = to_example(row.data, row.origin, self._rows, self._columns)
                prompt, words = example.prompt or example.completions[0], _words(example)
        except (RowRefused, RecursionError) as error:
            reason = error.reason if isinstance(error, RowRefused) else "deep_nesting"
            self.result.refused[reason] += 1
            origin = row.origin
            self.rejected.append({"file": origin.file, "line": origin.line, "reason": reason, "raw": row.raw_text})
            return None
        whole = _hash(words)
        if whole in self._seen and not self._keeps:
            self.result.duplicates += 1
            return None
        self._seen.add(whole)
        return _Kept(row.data, _hash(prompt), len(_json(words)))


def _words(example: Example) -> list[Any]:
    return [example.prompt, *example.completions, example.tools, example.label]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _hash(value: Any) -> bytes:
    return hashlib.blake2b(_json(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _write(
    folder: Path, splits: Mapping[str, Sequence[_Kept]], result: Prepared, rejected: Sequence[Mapping[str, Any]]
) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in splits.items():
            with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row.data, ensure_ascii=False, default=str) + "\n" for row in part)
        if rejected:
            with (folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in rejected)
        (folder / "statistics.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the files cannot be written: {error.strerror or error}", where=str(folder), fix="name another folder"
        ) from error
