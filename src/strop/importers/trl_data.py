"""The data of TRL's files and scripts. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.config.yamlfile import KeyPath
from strop.importers.key_answers import KeyAnswer, View, idle, left, translated


def evaluation_split(value: Any, view: View) -> KeyAnswer:
    if not view.evaluates():
        return idle("nothing is evaluated")
    return left(
        "strop holds out dataset.validation_split of the training rows; a split that is a file goes to val_file"
    )


def mixture(value: Any, view: View) -> Mapping[KeyPath, KeyAnswer]:
    """`datasets:` of TRL, a list of mappings with path, name, split, data_files, columns."""
    found: dict[KeyPath, KeyAnswer] = {}
    items = value if isinstance(value, list) else []
    sources = []
    for i, item in enumerate(items):
        source = {}
        for theirs, ours in (("path", "name"), ("name", "subset"), ("split", "split")):
            if isinstance(item, Mapping) and item.get(theirs) is not None:
                source[ours] = item[theirs]
                found[i, theirs] = idle(f"in dataset.sources as {ours}")
        sources.append(source)
    if sources and all("name" in source for source in sources):
        first = next(path for path in found if path[1] == "path")
        found[first] = translated({"dataset.sources": sources})
    return found


def data_files(value: Any, view: View) -> KeyAnswer:
    if isinstance(value, dict):
        value = value.get("train")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return translated({"dataset.train_file": value}) if isinstance(value, str) else left("name it as dataset.sources")


def path(value: Any, view: View) -> KeyAnswer:
    if view.get("data_files") is not None and value in ("json", "csv", "parquet", "text"):
        return idle("data_files names the file")
    return translated({"dataset.name": value})
