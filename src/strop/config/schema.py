"""What the schema says about its keys: names, types in words, defaults. Floor 1, no torch.

In: the classes. Out: `KEYS` for error messages, the command line and the reference page, and the JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from strop.config.base_section import Section
from strop.config.methods import METHODS, SAMPLING
from strop.config.run import RunConfig
from strop.config.sections import ModelSection, RewardSection, SourceSection
from strop.config.yamlfile import KeyPath, write_value

PRESET = "A preset under this configuration: cpu, gpu-bf16, gpu-fp16, memory-efficient, or the path of a YAML file."


@dataclass(frozen=True)
class Key:
    """One key of the schema. section: "" at the top, "models" for a key of each model."""

    section: str
    name: str
    field: FieldInfo
    methods: tuple[str, ...] = ()
    """The methods that read it, where not all do."""

    @property
    def dotted(self) -> str:
        """`training.learning_rate`, `models.N.name`, `seed`."""
        prefix = {"": "", "models": "models.N."}.get(self.section, f"{self.section}.")
        return prefix + self.name

    @cached_property
    def kinds(self) -> frozenset[Any]:
        """What a value can be: bool, int, float, str, tuple, Literal, NoneType."""
        return frozenset(get_origin(part) or part for part in _parts(self.field.annotation))

    @property
    def description(self) -> str:
        return " ".join((self.field.description or "").split())

    @cached_property
    def expected(self) -> str:
        """Type and range in plain words."""
        parts = [part for part in _parts(self.field.annotation) if part is not type(None)]
        words = self.extra("x-type") or " or ".join(_words(part, self.field.metadata) for part in parts)
        return f"{words}, or null" if type(None) in self.kinds else words

    @property
    def default(self) -> str:
        """The default as YAML, or in words where it depends on other keys."""
        if words := self.extra("x-default"):
            return words
        return "required" if self.field.default is PydanticUndefined else write_value(self.field.default)

    def extra(self, name: str) -> str:
        """Words that the schema gives beside the types; empty if it gives none."""
        extra = self.field.json_schema_extra
        return str(extra.get(name, "")) if isinstance(extra, dict) else ""

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal, in a list too."""
        return tuple(c for part in _parts(self.field.annotation) for c in _choices(part))


def _parts(annotation: Any) -> list[Any]:
    """The members of a union; `Annotated` is opened."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for arg in get_args(annotation) for part in _parts(arg)]
    return [annotation]


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return tuple(c for arg in get_args(annotation) for c in _choices(arg))


def _words(annotation: Any, metadata: Iterable[Any]) -> str:
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "text"
    if get_origin(annotation) is Literal:
        choices = _choices(annotation)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(annotation) is tuple:
        element = get_args(annotation)[0]
        bounds = get_args(element)[1].metadata if get_origin(element) is Annotated else ()
        words = _words(_parts(element)[0], bounds).replace("a whole number", "whole numbers")
        listed = f"these: {words.removeprefix('one of ')}" if _choices(element) else words
        return "a list of " + ("texts" if words == "text" else listed)
    noun = "a whole number" if annotation is int else "a number"
    return " ".join([noun, *_range(annotation is int, metadata)])


def _range(whole: bool, metadata: Iterable[Any]) -> Iterator[str]:
    """The bounds of a number, as one phrase or none."""
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    bounds = {name: getattr(bound, name) for bound in metadata for name in words if hasattr(bound, name)}
    if "gt" in bounds and whole:
        bounds["ge"] = bounds.pop("gt") + 1
    if "ge" in bounds and "le" in bounds:
        yield f"from {bounds['ge']} to {bounds['le']}"
    elif bounds:
        yield " and ".join(f"{words[name]} {bounds[name]}" for name in words if name in bounds)


READERS: Mapping[str, tuple[str, ...]] = dict.fromkeys(("rollout", "rewards"), tuple(SAMPLING))
"""Sections and keys at the top that only some methods read, and these methods."""


def _all_keys() -> Iterable[Key]:
    for name, field in RunConfig.model_fields.items():
        annotation = field.annotation
        if name == "models":
            yield from (Key(name, key, f) for key, f in ModelSection.model_fields.items())
        elif name == "post_training":
            names = dict.fromkeys(key for settings in METHODS.values() for key in settings.model_fields)
            yield from (setting(key) for key in names)
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            yield from (Key(name, key, f, READERS.get(name, ())) for key, f in annotation.model_fields.items())
        else:
            yield Key("", name, field, READERS.get(name, ()))


def setting(name: str, method: str | None = None) -> Key:
    """A key of post_training, as `method` declares it; else the first that reads it, with the meanings of all."""
    readers = {m: settings.model_fields[name] for m, settings in METHODS.items() if name in settings.model_fields}
    if name == "method":
        field = FieldInfo(
            annotation=Literal[tuple(METHODS)],  # type: ignore[arg-type]
            default="sft",
            description="The method. Each reads its own settings; a setting that it does not read is refused.",
        )
    else:
        field = readers.get(method or "") or _with_all_meanings(readers)
    return Key("post_training", name, field, tuple(readers))


def _with_all_meanings(readers: Mapping[str, FieldInfo]) -> FieldInfo:
    """The first field; where methods mean different things by the name, described by method."""
    meanings: dict[str, list[str]] = {}
    for method, field in readers.items():
        meanings.setdefault(field.description or "", []).append(method)
    field = copy(next(iter(readers.values())))
    if len(meanings) > 1:
        field.description = " ".join(f"{', '.join(who)}: {meaning}" for meaning, who in meanings.items())
    return field


KEYS: tuple[Key, ...] = tuple(_all_keys())
"""Every key, in the order of the schema; settings of all methods."""

SECTIONS: Mapping[str, Mapping[str, Key]] = {
    section: {key.name: key for key in KEYS if key.section == section}
    for section in dict.fromkeys(key.section for key in KEYS)
}
"""Section -> its keys by name; "" holds the keys that stand at the top."""


LISTED: Mapping[KeyPath, type[Section]] = {("rewards",): RewardSection, ("dataset", "sources"): SourceSection}
"""Keys whose values are lists of sections, and what these are."""


def listed_section(path: KeyPath) -> type[Section] | None:
    """What the key at a path such as ("rewards", 0, "weight") is a key of; None where it stands in no list."""
    inside = (kind for home, kind in LISTED.items() if path[: len(home)] == home and len(path) == len(home) + 2)
    return next(inside, None)


def key_at(path: KeyPath, method: str | None = None) -> Key | None:
    """The key at a path such as ("training", "bf16"), ("models", 0, "name") or ("seed",); None: there is none.

    What lies below a key (the element of a list) counts as the key.
    """
    if (section_of := listed_section(path)) is not None:
        name = str(path[-1])
        field = section_of.model_fields.get(name)
        return None if field is None else Key(str(path[0]), name, field)
    match path:
        case ("models", int(), str(name), *_):
            return SECTIONS["models"].get(name)
        case ("post_training", str(name), *_):
            return setting(name, method) if name in SECTIONS["post_training"] else None
        case (str(section), str(name), *_) if section in SECTIONS:
            return SECTIONS[section].get(name)
        case (str(name), *_):
            return SECTIONS[""].get(name)
    return None
