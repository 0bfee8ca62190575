"""Names of keys as people write them: dotted or bare, with the nearest valid one for a wrong one. Floor 1, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from strop.config.other_tools import RENAMED, instead_of
from strop.config.schema import KEYS, SECTIONS, Key
from strop.config.yamlfile import KeyPath, dotted
from strop.errors import ConfigError


def matches(name: str) -> list[KeyPath]:
    """The paths of the keys or sections that a dotted or bare name can mean; none: there is no such key.

    A bare key of a model has "*" where the model's position stands: the only model.
    """
    match name.split("."):
        case [only] if only and (only in SECTIONS[""] or only in SECTIONS or only == "preset"):
            return [(only,)]
        case [only]:
            return [_path(key) for key in KEYS if key.name == only]
        case ["models", index, last] if index.isdecimal() and len(index) < 5 and last in SECTIONS["models"]:
            return [("models", int(index), last)]
        case [section, last] if section != "models" and last in SECTIONS.get(section, ()):
            return [(section, last)]
    return []


def numbered(path: KeyPath) -> KeyPath:
    """The path with the only model's position, 0, in place of "*"."""
    return tuple(0 if part == "*" else part for part in path)


def target(name: str, where: str) -> KeyPath:
    """The one path that a name means.

    Raises:
        ConfigError: no key has this name, or several have it.
    """
    found = matches(name)
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(dotted(numbered(path)) for path in found)
        raise ConfigError(f"{name} stands in several sections", where=where, fix=f"write {names}")
    section, _, last = name.rpartition(".")
    hint = nearest(last, "models" if section.startswith("models") else section)
    raise ConfigError(f"there is no key {dotted([name])}", where=where, fix=hint)


def _path(key: Key) -> KeyPath:
    if key.section == "models":
        return ("models", "*", key.name)
    return (key.section, key.name) if key.section else (key.name,)


def nearest(name: str, section: str = "") -> str:
    """A hint for an unknown key: where it belongs, or what was probably meant. Empty if nothing is near.

    Args:
        name: the unknown key, without its section.
        section: the section in which it was found; "" for the top.
    """
    homes = [key.dotted for key in KEYS if key.name == name and key.section != section]
    if homes:
        return f"{name} belongs in {' or '.join(_section_of(home) for home in homes)}: {' or '.join(homes)}"
    if (known := RENAMED.get(name, RENAMED.get(f"{section}.{name}"))) is not None:
        return f"did you mean {known}?"
    if instead := instead_of(name):
        return instead
    own = [*SECTIONS.get(section, ()), *([*SECTIONS, "preset"] if not section else [])]
    if hint := did_you_mean(name, own, _in(section)):
        return hint
    if (close := closest(name, [key.name for key in KEYS])) is not None:
        return f"did you mean {' or '.join(key.dotted for key in KEYS if key.name == close)}?"
    if section in SECTIONS and section:
        return f"the keys of {section}: {', '.join(SECTIONS[section])}"
    return f"the sections: {', '.join(s for s in SECTIONS if s)}" if not section else ""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The hint `did you mean ...?` for an unknown name; empty if no known name is near. Every such hint is made here.

    Args:
        prefix: what to type before the known name, such as "strop methods ".
    """
    close = closest(name, known)
    return "" if close is None else f"did you mean {prefix}{close}?"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: the shortest one that begins with `name` (`gpu-bf16` for `gpu`), or else
    the most similar one; None if no name is near."""
    known = sorted(known, key=len)
    if len(name) > 2 and (begun := [k for k in known if k.startswith(name)]):
        return begun[0]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _section_of(home: str) -> str:
    return home.rpartition(".")[0] or "the top of the file"


def _in(section: str) -> str:
    return "" if section in ("", "models") else f"{section}."
