"""The YAML of what was read from another tool's file. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from strop.config.schema import KEYS
from strop.config.yamlfile import write_value
from strop.importers.key_answers import Fate
from strop.importers.translate import Entry, Imported, in_words, nested
from strop.redact import redact

ORDER = {key.dotted.replace(".N.", ".0."): i for i, key in enumerate(KEYS)}
WIDTH = 116


def to_text(found: Imported) -> str:
    """A configuration with a comment behind every value that says where it comes from."""
    lines = [
        f"# {found.method}, read from {_line(found.path.name)} of {found.tool} by strop import.",
        "# strop train --config THIS --dry-run shows every value and an example as it is trained.",
        *_block("Not carried over:", map(_words, found.of(Fate.LEFT))),
        *_block("These mean something else in strop:", found.notes),
    ]
    sections = nested(dict(sorted(found.values.items(), key=lambda item: ORDER[item[0]])))
    for section, value in sections.items():
        if section == "models":
            lines.append("models:")
            marks = ["  - ", *["    "] * (len(value[0]) - 1)]
            for mark, (name, item) in zip(marks, value[0].items(), strict=True):
                lines.append(_value(f"{mark}{name}", item, found.origins, f"models.0.{name}"))
        elif isinstance(value, Mapping) and section not in ORDER:
            lines.append(f"{section}:")
            lines += [_value(f"  {n}", item, found.origins, f"{section}.{n}") for n, item in value.items()]
        else:
            lines.append(_value(section, value, found.origins, section))
    return "\n".join(lines) + "\n"


def _value(name: str, value: Any, origins: Mapping[str, str], key: str) -> str:
    own = key.rpartition(".")[2]
    origin = origins.get(key, "")
    comment = "" if origin.rpartition(".")[2] == own and origin else f"  # {_line(origin)}"
    return f"{name}: {write_value(value)}{comment}"


def _words(entry: Entry) -> str:
    return f"{entry.key}: {redact(in_words(entry.value))}: {entry.answer.why}"


def _block(title: str, sentences: Any) -> Iterator[str]:
    found = list(sentences)
    if found:
        yield "#"
        yield f"# {title}"
        for sentence in found:
            yield from _wrapped(_line(sentence))


def _wrapped(text: str) -> Iterator[str]:
    line = "# -"
    for word in text.split():
        if len(line) + 1 + len(word) > WIDTH and line.strip("# -"):
            yield line
            line = "#  "
        line += f" {word}"
    yield line


def _line(text: str) -> str:
    """A text that stays in its comment."""
    return " ".join("".join(char if char.isprintable() else "?" for char in redact(text)).split())
