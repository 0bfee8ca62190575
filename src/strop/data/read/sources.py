"""Where rows come from: files, `save_to_disk` folders and hub data sets. Floor 2.

In: the `dataset` section of the configuration. Out: rows with their origin (file and physical line, from 1), in the
order of the source, read as a stream. A line that cannot be read becomes a row that carries its refusal, so one bad
line never touches another; only a source that is broken as a whole raises.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from os.path import exists, expanduser, isdir, isfile
from pathlib import Path

from strop.config import DatasetSection
from strop.config.sections import SourceSection
from strop.data.read.files import READERS, file_kind, read_lines, read_text, unreadable
from strop.data.read.row import Row
from strop.data.read.saved_datasets import hub_identity, read_hub, read_saved, saved_identity
from strop.errors import ConfigError, DataError
from strop.types import RowShape

logger = logging.getLogger("strop")

SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` writes, besides the rows."""

SPLIT_FILES: dict[RowShape, tuple[str, str]] = {
    "single": ("train.jsonl", "val.jsonl"),
    "prompt": ("train.jsonl", "val.jsonl"),
    "pair": ("train.dpo.jsonl", "val.dpo.jsonl"),
    "labelled": ("train.kto.jsonl", "val.kto.jsonl"),
    "group": ("train.groups.jsonl", "val.groups.jsonl"),
}


PREFIXES = ("jsonl:", "text:", "local:")
"""What a name can begin with, to say what it is."""


@dataclass(frozen=True)
class Source:
    """Rows under a name. `read` starts over at every call.

    identity: what stands for the rows: equal for equal rows, and another for others. read_lines: as `read`, but lines
    are not looked at yet, where the source has lines. limit: good rows at most. share: of its rows, at random.
    weight: how often each row is met in an epoch. is_stream: to read it again is to download it again.
    """

    label: str
    read: Callable[[], Iterator[Row]]
    identity: Callable[[], str]
    read_lines: Callable[[], Iterator[Row]] | None = None
    limit: int | None = None
    share: float = 1.0
    weight: float = 1.0
    is_stream: bool = False


@dataclass(frozen=True)
class Sources:
    """What to train on, and what to evaluate on where that is given explicitly."""

    train: tuple[Source, ...]
    eval: Source | None


def choose_sources(dataset: DatasetSection, rows: RowShape) -> Sources:
    """The sources that the configuration names: train_file > splits_dir > sources > name; val_file > splits_dir.

    Raises:
        ConfigError: no source is named.
        DataError: a named file or folder is not there or of no known kind.
    """
    if not _named_sources(dataset):
        raise ConfigError(
            "no training data is named",
            where="dataset",
            expected="dataset.train_file, dataset.splits_dir, dataset.sources or dataset.name",
            fix="set one of them, for example dataset.train_file: data/train.jsonl",
        )
    train_name, val_name = SPLIT_FILES[rows]
    if dataset.train_file is not None:
        train = [file_source(dataset.train_file)]
    elif dataset.splits_dir is not None:
        train = [_split_file(dataset.splits_dir, train_name, "dataset.train_file")]
    elif dataset.sources:
        train = [_weighed(source) for source in dataset.sources]
    else:
        assert dataset.name is not None
        train = [_named(dataset.name, dataset.subset, dataset.split, dataset.streaming)]
    if dataset.val_file is not None:
        return Sources(tuple(train), file_source(dataset.val_file))
    if dataset.splits_dir is not None:
        return Sources(tuple(train), _split_file(dataset.splits_dir, val_name, "dataset.val_file"))
    return Sources(tuple(train), None)


def warn_of_unread(dataset: DatasetSection) -> None:
    """Tells which keys name sources that others win over, and which say what part of a source is read where all is."""
    named = _named_sources(dataset)
    for key in named[1:]:
        if key != "splits_dir" or dataset.val_file is not None:  # else it still gives the validation rows
            logger.warning("dataset.%s is not read: dataset.%s wins over it", key, named[0])
    if named[:1] in (["name"], ["sources"]):
        parts = {f"dataset.sources.{i}": source for i, source in enumerate(dataset.sources)}
        for where, part in (parts if named[0] == "sources" else {"dataset": dataset}).items():
            if part.name is not None and _is_file(part.name):
                _warn_of_parts(part, where, f"{part.name} is a file, of which all rows are read")
    if named[:1] != ["name"]:
        _warn_of_parts(dataset, "dataset", f"it belongs to dataset.name, and dataset.{named[0]} names the rows")


def _warn_of_parts(section: DatasetSection | SourceSection, where: str, why: str) -> None:
    """Tells of keys that say what part of a data set is read, and that nobody reads."""
    for key in ("subset", "split"):
        if getattr(section, key) != type(section).model_fields[key].default:
            logger.warning("%s.%s: %s is not read: %s", where, key, getattr(section, key), why)


def _is_file(name: str) -> bool:
    """Whether a name is that of a file, as `_named` decides."""
    prefix, path = _prefix(name)
    return prefix in ("jsonl:", "text:") or (not isdir(path) and (isfile(path) or file_kind(path) is not None))


def _named_sources(dataset: DatasetSection) -> list[str]:
    return [key for key in ("train_file", "splits_dir", "sources", "name") if getattr(dataset, key)]


def _weighed(section: SourceSection) -> Source:
    source = _named(section.name, section.subset, section.split, section.streaming)
    return replace(source, limit=section.num_samples, share=section.fraction, weight=section.weight)


def _split_file(folder: str, name: str, key: str) -> Source:
    path = Path(expanduser(folder)) / name
    if not isdir(path.parent):
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
    return file_source(str(path))


def file_source(path: str) -> Source:
    """A file by its extension.

    Raises:
        DataError: it is not there, or its extension says nothing that can be read.
    """
    prefix, path = _prefix(path)
    if prefix == "local:":
        return _named(prefix + path, None, "train", False)
    if isdir(path):
        raise DataError(
            "this is a folder",
            where=path,
            expected="a file with rows",
            fix="name a file in it; a folder goes into dataset.splits_dir (split files) or dataset.name (save_to_disk)",
        )
    kind = {"jsonl:": ".jsonl", "text:": ".txt"}.get(prefix) or file_kind(path)
    if kind is None and exists(path):
        raise DataError(
            "the extension of the file says no format that can be read",
            where=path,
            expected="a name that ends in " + ", ".join(READERS) + " (.gz after the text formats)",
            fix="rename the file by what is in it, or convert it",
        )
    if kind is None or not isfile(path):
        if exists(path):
            raise DataError("this is no plain file", where=path, fix="write what comes out of it to a file first")
        raise DataError(
            "there is no such file",
            where=path,
            fix="check the path; it is relative to the folder where strop is started",
        )
    read = read_text if kind == ".txt" else READERS[kind]
    lines = partial(read_lines, path) if kind == ".jsonl" else None
    return Source(path, partial(read, path), partial(_content, path, kind), lines)


def _prefix(name: str) -> tuple[str, str]:
    """The prefix of a name, and the path behind it; `~` is the home folder, as in paths of models and runs."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return prefix, expanduser(name.removeprefix(prefix))


def _content(path: str, kind: str) -> str:
    """A hash of the file: the same rows are the same wherever they lie, and whatever their dates say."""
    digest = hashlib.blake2b(f"{kind} {path.lower().endswith('.gz')} ".encode(), digest_size=20)
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def _named(name: str, subset: str | None, split: str, streaming: bool) -> Source:
    prefix, path = _prefix(name)
    if prefix in ("jsonl:", "text:"):
        return file_source(name)
    if prefix == "local:" and not isdir(path):
        raise DataError(
            "there is no such folder",
            where=name,
            fix="check the path; it is relative to the folder where strop is started",
        )
    if isdir(path):
        if prefix or any((Path(path) / name).is_file() for name in SAVED):
            return Source(path, partial(read_saved, path, split), partial(saved_identity, path, split))
        return _from_hub(path, subset, split, streaming)  # a folder of files, which the package datasets reads
    if _is_file(name):
        return file_source(path)
    return _from_hub(path, subset, split, streaming)


def _from_hub(name: str, subset: str | None, split: str, streaming: bool) -> Source:
    return Source(
        f"{name} ({split})",
        partial(read_hub, name, subset, split, streaming),
        partial(hub_identity, name, subset, split),
        is_stream=streaming,
    )
