"""Reading a file of another tool. Floor 2, no torch.

In: a path. Out: a mapping of names to values, plain ones. Nothing of the file is run, imported or expanded: YAML is
read by the rules of `strop.config.yamlfile` (no anchors, no tags, at most 256 KiB), Python is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.config.yamlfile import MAX_BYTES, MAX_DEPTH, KeyPath, dotted, parse
from strop.errors import ConfigError
from strop.importers.python_calls import calls


@dataclass(frozen=True)
class ForeignFile:
    """A file that was read. groups: whether the names at the top are those of calls, each with its arguments."""

    path: Path
    data: Mapping[str, Any]
    groups: bool
    imported: frozenset[str] = frozenset()
    """The packages that a Python file imports."""


def read(path: Path) -> ForeignFile:
    """Reads a YAML, JSON or Python file.

    Raises:
        ConfigError: it is not there, too large, not text, or none of these.
    """
    text = _text(path)
    if path.suffix.lower() == ".py" or (
        path.suffix.lower() not in (".yaml", ".yml", ".json") and _looks_like_call(text)
    ):
        found, imported = calls(text, str(path))
        return ForeignFile(path, found, True, imported)
    if path.suffix.lower() == ".json":
        return ForeignFile(path, _json(text, str(path)), False)
    return ForeignFile(path, parse(text.encode(), str(path)).data, False)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            found = "this is a folder" if path.is_dir() else "there is no such file"
            raise ConfigError(found, where=str(path)[:200], expected="a configuration of another tool")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"the file cannot be read: {reason}", where=str(path)[:200]) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"the file is larger than {MAX_BYTES >> 10} KiB",
            where=str(path),
            expected="a configuration of another tool",
        )
    if (nul := data.find(0)) >= 0:
        raise ConfigError("a NUL byte", where=f"{path}:{data.count(10, 0, nul) + 1}", expected="UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "bytes that are not UTF-8",
            where=f"{path}:{data.count(10, 0, error.start) + 1}",
            fix="save the file as UTF-8",
        ) from None


def _looks_like_call(text: str) -> bool:
    """Whether a text of unknown kind begins as Python does."""
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    return first.startswith(("import ", "from ")) or "(" in first.partition(":")[0]


def _json(text: str, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(key for key in names if names.count(key) > 1)
            raise ConfigError(f"{dotted([twice])} is given twice", where=name, fix="remove one")
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ConfigError("too many levels of nesting", where=name) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}", where=name) from None
    if not isinstance(data, dict) or not data:
        raise ConfigError("the file holds no names with values", where=name, expected="an object, {...}")
    if _depth(data) > MAX_DEPTH:
        raise ConfigError(f"more than {MAX_DEPTH} levels of nesting", where=name)
    return data


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The keys below a value that have no keys below them. A list of plain values is one value."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value
