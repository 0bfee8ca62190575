"""Data sets that the package datasets keeps: folders written by `save_to_disk`, and the hub. Floor 2.

Rows are read as Arrow tables and never decoded: an image or a sound that nobody looks at cannot fail, and costs
nothing. Whatever that package raises, about a folder, a split or a row, becomes a DataError that names the data set.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strop.data.read.arrow import RowMaker
from strop.data.read.row import Row
from strop.errors import DataError, StropError
from strop.types import Origin

logger = logging.getLogger("strop")

ROWS_AT_ONCE = 256
LONGEST = 240
"""Characters of what a package says of an error, at most."""


def saved_identity(folder: str, split: str) -> str:
    """Names, sizes and dates of the folder's files: they are written once, by `save_to_disk`."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps(["saved", folder, split, facts])


def hub_identity(name: str, subset: str | None, split: str) -> str:
    """Where the package datasets keeps it: revision, files and their dates are in that path."""
    # datasets takes a second to import, and most runs read plain files
    import datasets

    with _hub_errors(name, subset, split):
        return json.dumps(["hub", name, split, datasets.load_dataset_builder(name, subset).cache_dir])


def read_saved(folder: str, split: str) -> Iterator[Row]:
    """The rows of a split of a `save_to_disk` folder.

    Raises:
        DataError: it is no such folder, has no such split, or cannot be read.
    """
    import datasets

    with _errors(
        "the folder cannot be read",
        where=f"{folder} (split {split})",
        expected="a folder that `save_to_disk` of the package datasets has written, and a split in it",
        fix="set dataset.train_file for plain files; check dataset.split",
    ):
        loaded = _loaded(Path(folder))
        parts = (
            _of_several(loaded, split)
            if isinstance(loaded, datasets.DatasetDict)
            else _of_one(loaded, str(loaded.split or "train"), split)
        )
        if not any(stop > start for _, _, start, stop in parts):
            raise ValueError("no rows were saved in it")
        for name, data, start, stop in parts:
            chosen = data if (start, stop) == (0, len(data)) else data.select(range(start, stop))
            yield from _rows(chosen, f"{folder}[{name}]", start)


def _loaded(folder: Path) -> Any:
    """The data set of a folder, or its data sets by split.

    One without rows is saved without files, and `load_from_disk` fails on it: it takes the first file to tell what it
    reads.
    """
    import datasets

    listing = folder / "dataset_dict.json"
    if listing.is_file():
        splits = json.loads(listing.read_text(encoding="utf-8"))["splits"]
        return datasets.DatasetDict({name: _loaded(folder / name) for name in splits})
    state = folder / "state.json"
    if state.is_file() and not json.loads(state.read_text(encoding="utf-8")).get("_data_files", True):
        return datasets.Dataset.from_dict({})
    return datasets.load_from_disk(str(folder))


Part = tuple[str, Any, int, int]
"""A split's name, its data set, and the first row and the one behind the last."""


def _of_several(loaded: Any, split: str) -> list[Part]:
    if split in loaded:
        return [(split, loaded[split], 0, len(loaded[split]))]
    if len(loaded) == 1:
        (own,) = loaded
        return _of_one(loaded[own], own, split)
    lengths = {name: len(data) for name, data in loaded.items()}
    return [(name, loaded[name], start, stop) for name, start, stop in _absolute(split, lengths)]


def _of_one(data: Any, own: str, split: str) -> list[Part]:
    """Of a folder with one split. All of it is meant, whatever the split was called when it was saved."""
    if split == own:
        return [(own, data, 0, len(data))]
    names = _split_names(split)
    if unknown := names - _split_names(own) - {"train"}:
        raise ValueError(f"it holds one split, {own!r}, and not {', '.join(sorted(unknown))}")
    lengths = dict.fromkeys(names, len(data))
    return [(own, data, start, stop) for _, start, stop in _absolute(split, lengths)]


def _split_names(split: str) -> set[str]:
    return {part.partition("[")[0].strip() for part in split.split("+")}


def _absolute(split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    import datasets

    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(p.splitname, p.from_ or 0, lengths[p.splitname] if p.to is None else p.to) for p in parts]


def read_hub(name: str, subset: str | None, split: str, streaming: bool) -> Iterator[Row]:
    """The rows of a split of a hub data set, or of a folder of files.

    Raises:
        DataError: it is out of reach, or cannot be read.
    """
    import datasets

    with _hub_errors(name, subset, split), _without_shared_memory():
        how = {"streaming": True} if streaming else {}
        loaded: Any = datasets.load_dataset(name, subset, split=split, **how)
        yield from _rows(loaded, f"{name}[{split}]", 0)


def _rows(data: Any, label: str, before: int) -> Iterator[Row]:
    """Rows of a data set that is read as a table. before: rows of the same split that are not in it."""
    maker: RowMaker | None = None
    number = before
    for batch in data.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        if maker is None or not maker.schema.equals(batch.schema):
            maker = RowMaker(batch.schema)
        for row in maker.rows(batch):
            number += 1
            yield Row(Origin(label, number), row)


@contextmanager
def _without_shared_memory() -> Iterator[None]:
    """A stream of the package datasets counts its epochs in shared memory where torch is there, for the workers of
    torch's loaders. Nothing here has such workers, and a container may have no /dev/shm."""
    import datasets

    before, datasets.config.TORCH_AVAILABLE = datasets.config.TORCH_AVAILABLE, False
    try:
        yield
    finally:
        datasets.config.TORCH_AVAILABLE = before


@contextmanager
def _hub_errors(name: str, subset: str | None, split: str) -> Iterator[None]:
    import datasets

    if not datasets.config.HF_HUB_OFFLINE:
        logger.info("data set %s: asking %s for it", name, datasets.config.HF_ENDPOINT)
    with _errors(
        "the data set cannot be loaded",
        where=f"dataset.name: {name}" + (f", subset {subset}" if subset else "") + f", split {split}",
        expected="an existing file or folder, or a data set of the Hugging Face hub that can be reached from here",
        fix="check the name, dataset.subset and dataset.split; offline, download it first and name its files; list "
        "files whose columns do not fit together one by one in dataset.sources",
    ):
        yield


@contextmanager
def _errors(found: str, *, where: str, expected: str, fix: str) -> Iterator[None]:
    try:
        yield
    except StropError:
        raise
    except Exception as error:  # a package with dozens of its own, and those of each file format
        raise DataError(f"{found}: {_said(error)}", where=where, expected=expected, fix=fix) from error


def _said(error: BaseException) -> str:
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # the error itself says that one occurred
    text = " ".join(str(error).split())  # what is available often stands in the second line
    text = text if len(text) <= LONGEST else text[:LONGEST].rstrip() + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
