"""From what pydantic found to what a user can act on. Floor 1, no torch.

In: a ValidationError, the data it was about, and the place of every value. Out: one ConfigError that lists every
problem once, each with place, key, value found, value expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from strop.config.base_section import Section, SectionError
from strop.config.methods import METHODS, LossType, MethodSettings
from strop.config.names import did_you_mean, nearest
from strop.config.other_tools import instead_of
from strop.config.run import RunConfig
from strop.config.schema import LISTED, SECTIONS, Key, key_at, listed_section
from strop.config.sections import ModelSection
from strop.config.yamlfile import KeyPath, dotted, scalar, write_value
from strop.errors import ConfigError, first_line
from strop.readable import is_number
from strop.redact import redact

Places = Mapping[KeyPath, str]
"""Path of a value -> where it was given, for messages: `FILE:LINE`, `preset NAME:LINE`, `--flag`."""

MAX_LISTED = 20
"""A message lists this many problems, and counts the rest."""

NO_MODEL = (
    "write into the configuration\n"
    "                models:\n"
    "                  - huggingface_id: org/model      # or the path of a folder\n"
    "            or give --model org/model on the command line"
)


def of_section(error: ValidationError, section: type, values: Mapping[str, Any]) -> ConfigError:
    """What is wrong with one section, or with a whole configuration, that was made in Python from these values."""
    found = next((path for kind, path in _homes().items() if issubclass(section, kind)), ())
    data: Any = values
    if found == ("post_training",):
        data = {"method": section.model_fields["method"].default, **values}  # type: ignore[attr-defined]
    for part in reversed(found):
        data = [data] if isinstance(part, int) else {part: data}
    return combined(explain(error, data, {}, found))


def _homes() -> dict[type, KeyPath]:
    """Where sections stand in a configuration."""
    named: dict[type, KeyPath] = {
        kind: (name,)
        for name, field in RunConfig.model_fields.items()
        if isinstance(kind := field.annotation, type) and issubclass(kind, Section)
    }
    named |= {kind: (*home, 0) for home, kind in LISTED.items()}
    return {**named, ModelSection: ("models", 0), MethodSettings: ("post_training",)}


def explain(error: ValidationError, data: Mapping[str, Any], places: Places, above: KeyPath = ()) -> list[ConfigError]:
    """Every problem that pydantic reports, in our words. above: where in the configuration what it speaks of stands."""
    problems: dict[tuple[KeyPath, str], ConfigError] = {}
    details = error.errors(include_url=False)
    for number, detail in enumerate(details):
        if len(problems) == MAX_LISTED:
            problems[(), "rest"] = ConfigError(f"and about {len(details) - number} more")
            break
        if detail["type"] == "default_factory_not_called" or (detail["type"] == "too_short" and detail["input"]):
            continue  # it follows from a value that is refused itself
        path = _path((*above, *detail["loc"]))
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, SectionError):
            for problem in cause.problems:
                keys = [(*path, *_parts(key)) for key in problem.keys]
                given = dict.fromkeys(places[key] for key in keys if key in places)
                problems[keys[0], problem.found] = ConfigError(
                    f"{dotted(path)}.{problem.found}" if path else problem.found,
                    where=" and ".join(given) or _place(keys[0], places),
                    expected=problem.expected,
                    fix=problem.fix,
                )
        elif (path, "") not in problems:
            problems[path, ""] = _single(detail, path, data, places)
    return list(problems.values())


def combined(problems: Sequence[ConfigError]) -> ConfigError:
    """One error that lists all."""
    if len(problems) == 1:
        return problems[0]
    listed = "\n".join("- " + str(problem).replace("\n", "\n  ") for problem in problems)
    number = "many" if len(problems) > MAX_LISTED else len(problems)
    return ConfigError(f"{number} problems in the configuration\n{listed}")


def _path(loc: tuple[str | int, ...]) -> KeyPath:
    """Where the problem lies in the configuration: pydantic's location without the tags of unions."""
    if loc[:1] == ("post_training",) and len(loc) > 1 and loc[1] in METHODS:
        loc = ("post_training", *loc[2:])
    depth = next((len(home) + 2 for home in LISTED if loc[: len(home)] == home), 2)
    return loc[:3] if loc[:1] == ("models",) else loc[:depth]


def _parts(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _place(path: KeyPath, places: Places) -> str:
    """The place of the value, or of the nearest thing that holds it."""
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return ""


def _single(detail: ErrorDetails, path: KeyPath, data: Mapping[str, Any], places: Places) -> ConfigError:
    """A problem of one key or one section."""
    kind, where = detail["type"], _place(path, places)
    section = str(path[0]) if len(path) > 1 else ""
    if kind == "extra_forbidden" and path == ("preset",):
        return ConfigError("a RunConfig has no preset", fix="strop.load_config(FILE, preset=NAME) lays it under a file")
    if kind == "extra_forbidden":
        return ConfigError(f"unknown key {dotted(path)}", where=where, fix=_meant(path, section))
    if kind.startswith("union_tag"):
        path = ("post_training", "method")
        where = _place(path, places)
    block = data.get("post_training")
    method = block.get("method") if isinstance(block, Mapping) else None
    key = key_at(path, method if isinstance(method, str) else None)
    if path == ("models",) or (kind == "missing" and path[:1] == ("models",)):
        return _models(kind, path, detail["input"], where, places)
    if key is not None and kind == "missing":
        return ConfigError(f"{dotted(path)} is missing", where=where, expected=_expected(key, kind))
    value = value_at(data, path, detail["input"])
    if key is None and (cause := detail.get("ctx", {}).get("error")) is not None:  # what a check did not foresee
        return ConfigError(f"{dotted(path)} cannot be checked: {first_line(cause)}", where=where)
    if key is None:  # a section that is not a section
        keys = ", ".join(list(SECTIONS.get(str(path[0]), ()))[:4])
        return ConfigError(f"{dotted(path)} is {shown(value)}", where=where, expected=f"keys and values ({keys}, ...)")
    fix = "" if isinstance(path[-1], int) else _fix(key, value)  # an entry of a list is not what its key is
    return ConfigError(f"{dotted(path)} is {shown(value)}", where=where, expected=_expected(key, kind), fix=fix)


def _meant(path: KeyPath, section: str) -> str:
    """What was probably meant by an unknown key."""
    if (listed := listed_section(path)) is None:
        return nearest(str(path[-1]), section)
    keys = list(listed.model_fields)
    hint = did_you_mean(str(path[-1]), keys, f"{dotted(path[:-1])}.")
    return hint or f"the keys of an entry of {dotted(path[:-2])}: {', '.join(keys)}"


def _models(kind: str, path: KeyPath, value: Any, where: str, places: Places) -> ConfigError:
    if kind == "missing" and len(path) == 3:
        beside = next((place for p, place in places.items() if p[:2] == path[:2]), "")
        return ConfigError(f"{dotted(path)} is missing", where=where or beside, expected="a hub id or a folder")
    if kind in ("missing", "too_short"):
        return ConfigError("no model is given", where=where, fix=NO_MODEL)
    return ConfigError(f"models is {shown(value)}", where=where, expected="a list of models", fix=NO_MODEL)


def value_at(data: Any, path: KeyPath, default: Any = None) -> Any:
    """What stands at a path of the data, else `default`."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return default
    return data


def _expected(key: Key, kind: str) -> str:
    return key.expected.replace("a number", "a finite number", 1) if kind == "finite_number" else key.expected


def shown(value: Any) -> str:
    """A value as a message shows it: as YAML writes it, short, without secrets."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            text = redact(value)
            return f"{text[:60] + '...' if len(text) > 60 else text!r} (text)"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return f"the list {_short(value)}" if value else "an empty list"
        case int() if value.bit_length() > 200:
            return "a number of more than 60 digits"
    return _short(value)


def _short(value: Any) -> str:
    text = redact(repr(list(value) if isinstance(value, tuple) else value))
    return text if len(text) <= 60 else text[:60] + "..."


def _elsewhere(key: Key, value: str) -> str:
    """Where a value that the key does not have stands, or what there is instead of it."""
    given = value.lower()
    if key.name == "loss_type" and given in METHODS:
        return f"write method: {given}"
    if key.name == "method" and given in get_args(LossType):
        return f"write method: dpo and loss_type: {given}"
    return instead_of(value) if key.choices else ""


def _fix(key: Key, value: Any) -> str:
    """What to write instead, where that can be told from the value."""
    kinds = key.kinds
    if isinstance(value, str):
        if bool in kinds and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        if instead := _elsewhere(key, value):
            return instead
        if hint := did_you_mean(value.lower(), key.choices):
            return hint
        bare = scalar(value.strip().replace("_", "").lstrip("0") or value)
        if kinds & {int, float} and is_number(bare):
            return f"write {bare}, without quotes, leading zeros or underscores"
        if bool in kinds and isinstance(bare, bool):
            return f"write {str(bare).lower()}, without quotes"
    if tuple in kinds and isinstance(value, list | tuple) and key.choices:
        unknown = [str(v) for v in value if v not in key.choices]
        instead = next(filter(None, map(instead_of, unknown)), "")
        instead = instead or next(filter(None, (did_you_mean(v.lower(), key.choices) for v in unknown)), "")
        return f"remove {', '.join(unknown)}"[:100] + (f": {instead}" if instead else "")
    if tuple in kinds and not isinstance(value, list | tuple | Mapping):
        return f"write a list: {write_value([value])}"[:100]
    if int in kinds and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if str in kinds and isinstance(value, bool | int | float):
        return "write it in quotes"
    return ""
