"""Where rows come from: files, `save_to_disk` folders and hub data sets. Floor 2.

In: the `dataset` section of the configuration. Out: rows with their origin (file and physical line, from 1), in the
order of the source, read as a stream. A line that cannot be read becomes a row that carries its refusal, so one bad
line never touches another; only a source that is broken as a whole raises.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import Any

from strop.config import DatasetSection
from strop.data.readers import READERS, file_kind
from strop.data.rows import Row
from strop.errors import ConfigError, DataError
from strop.types import Origin, RowShape

logger = logging.getLogger("strop")

SPLIT_FILES: dict[RowShape, tuple[str, str]] = {
    "single": ("train.jsonl", "val.jsonl"),
    "pair": ("train.dpo.jsonl", "val.dpo.jsonl"),
}


@dataclass(frozen=True)
class Source:
    """Rows under a name. `read` starts over at every call."""

    label: str
    read: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Sources:
    """What to train on, and what to evaluate on where that is given explicitly."""

    train: Source
    eval: Source | None


def choose_sources(dataset: DatasetSection, rows: RowShape) -> Sources:
    """The sources that the configuration names: train_file > splits_dir > name; val_file > splits_dir.

    Raises:
        ConfigError: no source is named.
        DataError: a named file or folder is not there or of no known kind.
    """
    named = [key for key in ("train_file", "splits_dir", "name") if getattr(dataset, key) is not None]
    if not named:
        raise ConfigError(
            "no training data is named",
            where="dataset",
            expected="dataset.train_file, dataset.splits_dir or dataset.name",
            fix="set one of them, for example dataset.train_file: data/train.jsonl",
        )
    for key in named[1:]:
        if key == "name" or dataset.val_file is not None:  # else splits_dir still gives the validation rows
            logger.warning("dataset.%s is not read: dataset.%s wins over it", key, named[0])
    train_name, val_name = SPLIT_FILES[rows]
    if dataset.train_file is not None:
        train = _file(dataset.train_file)
    elif dataset.splits_dir is not None:
        train = _split_file(dataset.splits_dir, train_name, "dataset.train_file")
    else:
        assert dataset.name is not None
        train = _named(dataset.name, dataset.subset, dataset.split)
    if dataset.val_file is not None:
        return Sources(train, _file(dataset.val_file))
    if dataset.splits_dir is not None:
        return Sources(train, _split_file(dataset.splits_dir, val_name, "dataset.val_file"))
    return Sources(train, None)


def _split_file(folder: str, name: str, key: str) -> Source:
    path = Path(folder) / name
    if not isdir(folder):
        raise DataError(
            "there is no such folder",
            where=f"dataset.splits_dir: {folder}",
            expected=f"a folder with {name}",
            fix="check the path; it is relative to the folder where strop is started",
        )
    if not isfile(path):
        raise DataError(
            f"{name} is not in the folder of dataset.splits_dir",
            where=folder,
            expected=str(path),
            fix=f"add the file, or set {key}",
        )
    return _file(str(path))


def _file(path: str) -> Source:
    """A file by its extension.

    Raises:
        DataError: it is not there, or its extension says nothing that can be read.
    """
    if isdir(path):
        raise DataError(
            "this is a folder",
            where=path,
            expected="a file with rows",
            fix="name a file in it; a folder goes into dataset.splits_dir (split files) or dataset.name (save_to_disk)",
        )
    kind = file_kind(path)
    if kind is None and exists(path):
        raise DataError(
            "the extension of the file says no format that can be read",
            where=path,
            expected="a name that ends in " + ", ".join(READERS) + " (.gz after the text formats)",
            fix="rename the file by what is in it, or convert it",
        )
    if kind is None or not isfile(path):
        raise DataError(
            "there is no such file",
            where=path,
            fix="check the path; it is relative to the folder where strop is started",
        )
    return Source(path, partial(READERS[kind], path))


def _named(name: str, subset: str | None, split: str) -> Source:
    if isdir(name):
        return Source(name, partial(_read_saved, name, split))
    if isfile(name) or file_kind(name) is not None:
        return _file(name)
    return Source(f"{name} ({split})", partial(_read_hub, name, subset, split))


def _read_saved(folder: str, split: str) -> Iterator[Row]:
    # datasets takes a second to import, and most runs read plain files
    import datasets

    try:
        loaded = datasets.load_from_disk(folder)
        if not isinstance(loaded, datasets.DatasetDict):
            loaded = {str(loaded.split or "train"): loaded}
        lengths = {name: len(part) for name, part in loaded.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (OSError, ValueError, AssertionError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the folder cannot be read: {_first_line(error)}",
            where=f"{folder} (split {split})",
            expected="a folder that `save_to_disk` of the package datasets has written, and a split in it",
            fix="set dataset.train_file for plain files; check dataset.split",
        ) from error
    for part in parts:
        for i in range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to):
            yield Row(Origin(f"{folder}[{part.splitname}]", i + 1), loaded[part.splitname][i])


def _read_hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set cannot be loaded: {_first_line(error)}",
            where=f"dataset.name: {name}" + (f", subset {subset}" if subset else "") + f", split {split}",
            expected="an existing file or folder, or a data set of the Hugging Face hub that can be reached from here",
            fix="check the name, dataset.subset and dataset.split; offline, download it first and name its files",
        ) from error
    for i, data in enumerate(loaded):
        yield Row(Origin(f"{name}[{split}]", i + 1), data)


def _first_line(error: BaseException) -> str:
    text = re.split(r"[\r\n]", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
