"""The data of TRL's files and scripts. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.config.yamlfile import KeyPath
from strop.importers.key_answers import KeyAnswer, View, carried, idle, left, translated


def evaluation_split(value: Any, view: View) -> KeyAnswer:
    if not view.evaluates():
        return idle("nothing is evaluated")
    return left(
        "strop holds out dataset.validation_split of the training rows; a split that is a file goes to val_file"
    )


FORMATS = ("json", "csv", "parquet", "text")
"""What stands in place of a data set's name where files are named beside it."""


def mixture(value: Any, view: View) -> Mapping[KeyPath, KeyAnswer]:
    """`datasets:` of TRL, a list of mappings with path, name, split, data_files, columns."""
    found: dict[KeyPath, KeyAnswer] = {}
    sources: list[dict[str, Any]] = []
    for i, item in enumerate(value if isinstance(value, list) else []):
        told = {key: told for key, told in item.items() if told is not None} if isinstance(item, Mapping) else {}
        files = named_files(told["data_files"]) if told.get("path") in FORMATS and "data_files" in told else []
        if files:
            sources += [{"name": source_name(file, str(told["path"]))} for file in files]
            found |= {(i, key): idle("in dataset.sources") for key in ("path", "data_files")}
            if "split" in told:
                found[i, "split"] = split_of_file(told["split"])
            continue
        source = {}
        for theirs, ours in (("path", "name"), ("name", "subset"), ("split", "split")):
            if theirs in told:
                source[ours] = told[theirs]
                found[i, theirs] = idle(f"in dataset.sources as {ours}")
        if "data_files" in told:
            found[i, "data_files"] = left(PART_OF_A_SET)
            if told.get("path") in FORMATS:
                del source["name"]
        sources.append(source)
    if sources and all("name" in source for source in sources):
        first = next(path for path in found if path[1] == "path")
        return found | {first: translated({"dataset.sources": sources})}
    return {key: answer for key, answer in found.items() if key[1] != "path"}


PART_OF_A_SET = "strop reads a data set whole, or by its subset and split: name its files one by one in dataset.sources"


def named_files(value: Any) -> list[str]:
    """The training files that `data_files` names; none where it is not known which these are."""
    if isinstance(value, Mapping):
        value = value.get("train") if set(value) == {"train"} else None
    files = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    known = all(isinstance(file, str) and not set("*?[") & set(file) for file in files)
    return files if known else []


def source_name(file: str, kind: str) -> str:
    """A file as strop names it: lines of text have no ending by which it could tell."""
    return f"text:{file}" if kind == "text" else file


def split_of_file(value: Any) -> KeyAnswer:
    """`split` beside files, all of whose rows are `train` there."""
    if value in ("train", None):
        return idle("all rows of a file are read")
    return left("strop reads all rows of a file; dataset.max_samples, or num_samples of a source, takes the first")


def split(value: Any, view: View) -> KeyAnswer:
    """`split` of load_dataset."""
    files = view.get("data_files")
    if files is None or view.get("path") not in FORMATS or not isinstance(value, str):
        return carried("dataset.split", value)
    name, bracket, _ = value.partition("[")
    return split_of_file("train" if isinstance(files, Mapping) and name in files and not bracket else value)


def data_files(value: Any, view: View) -> KeyAnswer | Mapping[KeyPath, KeyAnswer]:
    """`data_files` of load_dataset: a file, a list of files, or files by the name of their split."""
    if isinstance(value, Mapping):
        return _by_split(value, view)
    given = view.get("path")
    kind = given if isinstance(given, str) else ""
    files = named_files(value)
    if not files or kind not in ("", *FORMATS):
        return left(PART_OF_A_SET)
    names = [source_name(file, kind) for file in files]
    return translated({"dataset.train_file": names[0]} if len(names) == 1 else {"dataset.sources": names})


def _by_split(value: Mapping[str, Any], view: View) -> Mapping[KeyPath, KeyAnswer]:
    found: dict[KeyPath, KeyAnswer] = {}
    for split, named in value.items():
        if split == str(view.get("split", "train")).partition("[")[0]:
            answer = data_files(named, view)
            assert isinstance(answer, KeyAnswer)
        elif not view.evaluates():
            answer = idle("nothing is evaluated")
        elif len(files := named_files(named)) == 1 and split in ("test", "validation", "eval", "val", "dev"):
            answer = translated({"dataset.val_file": source_name(files[0], str(view.get("path", "")))})
        else:
            answer = left("strop validates on one file: name it as dataset.val_file")
        found[split,] = answer
    return found


def path(value: Any, view: View) -> KeyAnswer:
    if view.get("data_files") is not None and value in FORMATS:
        return idle("data_files names the file")
    return translated({"dataset.name": value})
