"""YAML as configurations use it: one mapping, plain values, a line number for every key. Floor 1, no torch.

In: bytes. Out: a `Document` of dicts, lists and scalars, with the line of every key and list element.

PyYAML's scanner and parser read the text; what a value means is decided here, by the rules of YAML 1.2 and not of 1.1:
`5e-7` is a number, only `true` and `false` are booleans, `yes`, `on`, `012`, `1_000` and `2024-01-01` stay text (and
are refused where a number or boolean is wanted). Tags, anchors, aliases, repeated keys and a second document are
refused: nothing in a configuration runs code or grows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from strop.errors import ConfigError
from strop.redact import redact

MAX_BYTES = 1 << 18
MAX_DEPTH = 16
MAX_DIGITS = 100
INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The parser in C, where PyYAML has been built with it: a tenth of the time."""
PLAIN = re.compile(r'[\n "-=@-{}~]*')  # printable ASCII without !, >, ? and |
"""Text that it reads as PyYAML's own does; of other characters it forgives more, such as tabs."""

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the top."""


def dotted(path: Iterable[str | int]) -> str:
    """A path as it is written, `models.0.name`, fit for a message."""
    return ".".join(_printable(str(part)) for part in path)


def _printable(text: str) -> str:
    text = redact("".join(char if char.isprintable() else "?" for char in text))
    return text if len(text) <= 80 else text[:80] + "..."


class Document(NamedTuple):
    """The data of a file, and the line (from 1) on which each key or list element stands."""

    data: dict[str, Any]
    lines: dict[KeyPath, int]


def scalar(text: str) -> bool | int | float | str | None:
    """What a plain (unquoted) YAML scalar means."""
    if text in SPECIAL:
        return SPECIAL[text]
    if len(text) <= MAX_DIGITS:
        if INT.fullmatch(text):
            return int(text)
        if FLOAT.fullmatch(text):
            return float(text)
    return text


def read_file(path: Path, name: str) -> Document:
    """Reads a configuration file; `name` is what messages call it.

    Raises:
        ConfigError: no such file, not readable, or `parse` refuses it.
    """
    path = Path(os.path.expanduser(path))
    try:
        if path.is_dir():
            raise ConfigError("this is a folder", where=name, expected="a YAML file", fix=_beside(path / "x"))
        if path.exists() and not path.is_file():
            raise ConfigError("this is not a regular file", where=name, expected="a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"the configuration cannot be read: {reason}", where=name, fix=_beside(path)) from None
    return parse(data, name)


def _beside(path: Path) -> str:
    try:
        files = sorted(str(f) for f in path.parent.glob("*.y*ml"))[:8]
    except (OSError, ValueError):
        files = []
    there = f"; YAML files in that folder: {', '.join(files)}" if files else ""
    return f"check the path; it is relative to the folder where strop is started{there}"


def parse(data: bytes, name: str) -> Document:
    """Reads one document with a mapping at the top.

    Raises:
        ConfigError: with `name` and the line.
    """
    builder = _Builder(name)
    value = builder.document(_decoded(data, name))
    if value is None:
        raise ConfigError(
            "the configuration is empty", where=name, expected="sections such as `models:` and `dataset:`"
        )
    if not isinstance(value, dict):
        raise ConfigError(
            f"the configuration is {'a list' if isinstance(value, list) else 'a single value'}",
            where=name,
            expected="sections such as `models:` and `dataset:`, each with its keys",
        )
    return Document(value, builder.lines)


def parse_value(text: str, name: str) -> Any:
    """Reads a value as it stands after `key:`, for the command line."""
    return _Builder(name, lines=False).document(text)


def _decoded(data: bytes, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"the file is larger than {MAX_BYTES >> 10} KiB", where=name, expected="a configuration")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError("the file is UTF-16 or UTF-32", where=name, expected="UTF-8", fix="save it as UTF-8")
    if (nul := data.find(0)) >= 0:
        raise ConfigError("a NUL byte", where=_at(name, data.count(b"\n", 0, nul) + 1), expected="UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("bytes that are not UTF-8", where=_at(name, line), fix="save the file as UTF-8") from None


def _at(name: str, line: int | None) -> str:
    return name if line is None else f"{name}:{line}"


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


class _Builder:
    """Builds values from PyYAML's events, noting lines."""

    def __init__(self, name: str, lines: bool = True) -> None:
        self.name, self.lines, self.numbered = name, dict[KeyPath, int](), lines

    def document(self, text: str) -> Any:
        try:
            if PLAIN.fullmatch(text):
                return self._built(text, FAST)
        except yaml.YAMLError:  # PyYAML's own says better what is wrong
            self.lines.clear()
        try:
            return self._built(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            raise self.syntax(error) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise ConfigError(
                f"the character {error.character!r}, which YAML does not allow", where=self.at(line), fix="remove it"
            ) from None

    def _built(self, text: str, loader: type[yaml.SafeLoader]) -> Any:
        events = yaml.parse(text, loader)
        value, documents = None, 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.refuse(event, "a second document (---)", "one document a file")
            elif isinstance(event, yaml.NodeEvent):
                value = self.node(event, events, ())
        return value

    def at(self, line: int) -> str:
        return _at(self.name, line if self.numbered else None)

    def refuse(self, event: yaml.Event, found: str, expected: str = "", fix: str = "") -> ConfigError:
        return ConfigError(found, where=self.at(_line(event)), expected=expected, fix=fix)

    def syntax(self, error: yaml.MarkedYAMLError) -> ConfigError:
        mark = error.problem_mark or error.context_mark
        where = self.at(mark.line + 1) if mark else self.name
        problem = error.problem or error.context or "not readable"
        if "\\t" in problem:
            return ConfigError("a tab", where=where, expected="spaces", fix="indent and separate with spaces")
        context = f" ({error.context})" if error.context and error.problem else ""
        return ConfigError(f"not valid YAML: {problem}{context}", where=where, fix="check indentation and quotes")

    def node(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> Any:
        if getattr(event, "anchor", None) is not None:  # an alias has one too
            raise self.refuse(event, "an anchor or alias (& or *)", fix="write the value out")
        if getattr(event, "tag", None) is not None:
            raise self.refuse(event, "a tag (!)", fix="remove it; values need no tags")
        if len(path) >= MAX_DEPTH:
            raise self.refuse(event, f"more than {MAX_DEPTH} levels of nesting", "sections, keys and values")
        if isinstance(event, yaml.ScalarEvent):
            return scalar(event.value) if not event.style else event.value
        return self.sequence(events, path) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(events, path)

    def sequence(self, events: Iterator[yaml.Event], path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = _line(event)
            items.append(self.node(event, events, here))
        return items

    def mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.refuse(event, "a key that is not plain text", "`key: value`")
            self.node(event, events, path)  # refuses tags and anchors
            key = event.value
            here = (*path, key)
            if key in found:
                raise self.refuse(
                    event, f"{dotted(here)} is given twice; first on line {self.lines[here]}", fix="remove one"
                )
            self.lines[here] = _line(event)
            found[key] = self.node(next(events), events, here)
        return found


def write_value(value: Any) -> str:
    """A scalar, a section, a mapping or a list of these in YAML, on one line; `parse_value` reads it back equal."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_value, value)) + "]"
    if isinstance(value, BaseModel | Mapping):
        items = value.items() if isinstance(value, Mapping) else value
        return "{" + ", ".join(f"{write_value(key)}: {write_value(item)}" for key, item in items) + "}"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*", text, re.ASCII) and scalar(text) == text:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable() and char != "\ufeff":
        return char
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\U{ord(char):08x}"
