"""Layers: built-in defaults < preset < configuration file < overrides. Floor 1, no torch.

In: a path, a preset's name, overrides by dotted or bare key. Out: a RunConfig with the origin of every value.

    Layer   the values of one source, flat: path -> value, and the place of each
    Stack   the layers merged so far: a later value replaces an earlier one, key by key, lists as a whole

The keys of a pair in `EXCLUSIVE` cannot hold together: the later layer decides, and switches the other off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from strop.config.base_section import Section
from strop.config.explain import combined, explain, shown, value_at
from strop.config.guidance import default_origin, resolve
from strop.config.methods import MethodSettings
from strop.config.names import did_you_mean, numbered, target
from strop.config.run import RunConfig
from strop.config.schema import SECTIONS, key_at
from strop.config.sections import LoraSection
from strop.config.yamlfile import KeyPath, dotted, parse_value, read_file, scalar
from strop.errors import ConfigError

EXCLUSIVE = (("training", "bf16", "fp16", False), ("training", "warmup_steps", "warmup_ratio", None))
"""(section, key, key, off): one of the two at most."""

PRESETS = Path(__file__).with_name("presets")
PROJECT_PRESETS = Path("configs", "presets")


class Place(NamedTuple):
    """Where a value was given: `origin` for the table of origins, `where` for messages."""

    origin: str
    where: str


class CommandLine(dict[str, str]):
    """Overrides given as flags: dotted or bare key -> text; `flags`: the same key -> the flag as it was typed."""

    def __init__(self) -> None:
        super().__init__()
        self.flags: dict[str, str] = {}


@dataclass(frozen=True)
class Layer:
    """The values of one source. Paths: (key,), (section, key), (models, i, key)."""

    values: Mapping[KeyPath, Any]
    places: Mapping[KeyPath, Place]
    preset: str | None = None


def load_config(
    path: str | PathLike[str] | None = None,
    *,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Reads a configuration: defaults < preset < file < overrides.

    Args:
        path: a YAML file; None: preset and overrides alone.
        preset: a preset's name or path; wins over the file's `preset:`.
        overrides: dotted keys (`training.learning_rate`, `models.0.name`), or bare ones where only one section has
            them (`learning_rate`), to values; a section's name to a mapping of its keys. Text for a key that does
            not take text is read as YAML (`"5e-7"`).

    Raises:
        ConfigError: every problem with its place, the value found and the values expected.
    """
    file = _file_layer(path) if path is not None else Layer({}, {})
    last = _override_layer(overrides or {})
    name = preset if preset is not None else last.preset if last.preset is not None else file.preset
    if not isinstance(name, str | None):
        raise ConfigError(f"preset is {shown(name)}", where="preset", expected="the name or the path of a preset")
    stack = Stack()
    for layer in (*([_preset_layer(name)] if name is not None else []), file, last):
        stack.add(layer)
    return resolve(stack.build())


# ---- one source each


def _file_layer(path: str | PathLike[str]) -> Layer:
    name = _printable(fspath(path))
    document = read_file(Path(path), name)
    places = {p: Place(f"{name}:{line}", f"{name}:{line}") for p, line in document.lines.items()}
    return _document_layer(document.data, places)


def _preset_layer(name: str) -> Layer:
    label = f"preset {_printable(name)}"
    document = read_file(_find_preset(name), label)
    places = {p: Place(label, f"{label}:{line}") for p, line in document.lines.items()}
    layer = _document_layer(document.data, places)
    if layer.preset is not None:
        raise ConfigError("a preset names a preset", where=label, fix="write its values out")
    return layer


def _find_preset(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        return Path(name)
    folders = (PROJECT_PRESETS, PRESETS)
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    if name not in known:
        raise ConfigError(
            f"there is no preset {name[:80]!r}",
            where="preset",
            expected=f"one of {', '.join(known)}, or the path of a YAML file",
            fix=did_you_mean(name, known),
        )
    return next(file for folder in folders if (file := folder / f"{name}.yaml").is_file())


def _document_layer(data: Mapping[str, Any], places: Mapping[KeyPath, Place]) -> Layer:
    """The layer of a file. Null for a section is an empty section. `lora` and `rollout` may not be empty: whether that
    switches them on could be read either way."""
    values: dict[KeyPath, Any] = {}
    preset = None
    problems = []
    for name, value in data.items():
        if name == "preset":
            if value is not None and not isinstance(value, str):
                problems.append(ConfigError(f"preset is {shown(value)}", where=places[name,].where, expected="a name"))
            preset = value if isinstance(value, str) else None
        elif name in SECTIONS and name not in ("", "models"):
            if isinstance(value, Mapping):
                values.update({(name, str(key)): item for key, item in value.items()})
            if isinstance(value, Mapping) or value is None:
                if name in ("lora", "rollout") and not value:
                    problems.append(_empty_switch(name, places[name,].where))
                continue
            problems.append(_not_a_section(name, value, places[name,].where))
        else:
            values[name,] = value
    if problems:
        raise combined(problems)
    return Layer(values, places, preset)


def _not_a_section(name: str, value: Any, where: str) -> ConfigError:
    keys = ", ".join(list(SECTIONS[name])[:3])
    return ConfigError(f"{name} is {shown(value)}", where=where, expected=f"a section with keys ({keys}, ...)")


def _empty_switch(name: str, where: str) -> ConfigError:
    expected = "enabled: true or enabled: false, or other keys (they switch it on)"
    return ConfigError(f"the {name} section is empty", where=where, expected=expected)


def _override_layer(overrides: Mapping[str, Any]) -> Layer:
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides is {shown(overrides)}", expected="a mapping of dotted keys to values")
    flags = overrides.flags if isinstance(overrides, CommandLine) else None
    values: dict[KeyPath, Any] = {}
    places: dict[KeyPath, Place] = {}
    seen: dict[KeyPath, Place] = {}
    preset: str | None = None
    for name, value in overrides.items():
        if not isinstance(name, str):
            raise ConfigError(f"a key of the overrides is {shown(name)}", expected="text, as training.learning_rate")
        place = Place("command line", flags[name]) if flags is not None else Place("python", f"overrides[{name!r}]")
        path = target(name, place.where)
        if path == ("preset",):
            preset = value
            continue
        for leaf, item in _expanded(path, value, place).items():
            if (first := seen.setdefault(numbered(leaf), place)) is not place:
                raise ConfigError(f"{dotted(numbered(leaf))} is given twice", where=f"{first.where} and {place.where}")
            values[leaf] = _typed(leaf, item, place, flags is not None)
            places[leaf] = place
    return Layer(values, places, preset)


def _expanded(path: KeyPath, value: Any, place: Place) -> Mapping[KeyPath, Any]:
    """A section given as a mapping or as a section object: key by key."""
    name = str(path[0])
    if len(path) > 1 or name not in SECTIONS or name == "models":
        return {path: value}
    value = _plain(value)
    if not isinstance(value, Mapping):
        raise _not_a_section(name, value, place.where)
    if name in ("lora", "rollout") and not value:
        raise _empty_switch(name, place.where)
    return {(name, str(key)): item for key, item in value.items()}


def _typed(path: KeyPath, value: Any, place: Place, flag: bool) -> Any:
    """Text as the value that its key takes: text stays text where the key takes text."""
    if isinstance(value, PathLike):
        return fspath(value)
    key = key_at(numbered(path))
    if not isinstance(value, str) or key is None:
        return _plain(value)
    if tuple in key.kinds and flag and ("," in value or value.startswith("[") or str not in key.kinds):
        null = type(None) in key.kinds and scalar(value) is None
        return None if null else parse_value(value if value.startswith("[") else f"[{value}]", place.where)
    if Mapping in key.kinds:
        return parse_value(value, place.where)
    if not value.strip() and not {str, tuple} & key.kinds:
        # in a file nothing behind a key is null, the default; here it is a variable of the shell that is not set
        raise ConfigError(
            f"{dotted(numbered(path))} is empty", where=place.where, fix="write a value; null stands for the default"
        )
    bare = scalar(value.strip())
    if str in key.kinds:
        # as in a file: what reads as another kind that the key takes is of that kind
        is_meant = type(bare) in key.kinds if bare is not None else value == "null" and type(None) in key.kinds
        return bare if flag and is_meant else value
    return bare


def _plain(value: Any) -> Any:
    """Section objects, also in lists, as mappings of what was given."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, Section):
        return value
    says = {"enabled"} if isinstance(value, LoraSection) else {"method"} if isinstance(value, MethodSettings) else set()
    return {name: getattr(value, name) for name in value.model_fields_set | says}


def _is_on(value: Any) -> bool:
    return value is not None and value is not False


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name)


# ---- together


@dataclass
class Stack:
    """Layers merged so far."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    listed: bool = False
    """Whether a layer lists models; flags can then change them, not add to them."""

    def add(self, layer: Layer) -> None:
        """Puts a layer on top.

        Raises:
            ConfigError: the layer speaks of a model that is not there.
        """
        switched_off = self._switched_off(layer)
        below: dict[KeyPath, dict[KeyPath, Place]] = {path: {} for path in layer.values}
        for path, place in layer.places.items():
            for end in range(1, len(path) + 1):
                if path[:end] in below:
                    below[path[:end]][path] = place
        for path, value in layer.values.items():
            self._set(path, value, below[path])
        for path, (value, place) in switched_off.items():
            self._set(path, value, {path: place})

    def _switched_off(self, layer: Layer) -> dict[KeyPath, tuple[Any, Place]]:
        """Keys that an earlier layer switched on and that cannot stay on beside this layer's."""
        found: dict[KeyPath, tuple[Any, Place]] = {}
        for section, *pair, off in EXCLUSIVE:
            paths: list[KeyPath] = [(section, str(key)) for key in pair]
            on = [path for path in paths if _is_on(layer.values.get(path))]
            if len(on) == 2:
                continue  # refused by the section
            for path in on:
                other = paths[1 - paths.index(path)]
                earlier = self._get(other)
                if other not in layer.values and _is_on(earlier):
                    by = layer.places[path]
                    found[other] = off, Place(f"switched off by {path[1]} ({by.origin})", by.where)
        return found

    def _get(self, path: KeyPath) -> Any:
        section = self.data.get(str(path[0]))
        return section.get(path[1]) if isinstance(section, dict) else None

    def _set(self, path: KeyPath, value: Any, places: Mapping[KeyPath, Place]) -> None:
        """Puts a value at its path; `places`: its own place and those of what it holds."""
        if path[0] == "models" and len(path) == 3:
            path = self._set_model(path, value, places[path])
            places = {path: next(iter(places.values()))}
        elif len(path) == 1:
            self.data[str(path[0])] = value
            self.listed = self.listed or (path == ("models",) and bool(value))
        else:
            self.data.setdefault(str(path[0]), {})[path[1]] = value
        if path in self.places:
            for old in [p for p in self.places if p[: len(path)] == path]:
                del self.places[old]
        self.places.update(places)

    def _set_model(self, path: KeyPath, value: Any, place: Place) -> KeyPath:
        """Puts a value into one model; returns its path with the model's position."""
        models = self.data.get("models") or []
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            return numbered(path)  # refused as a whole
        models = list(models)
        index = path[1]
        if index == "*":
            if len(models) > 1:
                example = f"models.0.{path[2]}"
                raise ConfigError(
                    f"{path[2]} could mean any of the {len(models)} models", where=place.where, fix=f"write {example}"
                )
            index = 0
        assert isinstance(index, int)
        created = not self.listed and index == len(models)
        if not created and index >= len(models):
            raise ConfigError(
                f"there is no model {index}",
                where=place.where,
                expected=f"0 to {len(models) - 1}" if models else "models.0",
            )
        if created:
            models.append({})
        models[index] = {**models[index], path[2]: value}
        self.data["models"] = models
        return ("models", index, path[2])

    def build(self) -> RunConfig:
        """The configuration, with the origin of every value.

        Raises:
            ConfigError: lists every problem.
        """
        try:
            config = RunConfig.model_validate(self.data)
        except ValidationError as error:
            where = {path: place.where for path, place in self.places.items()}
            raise combined(explain(error, self.data, where)) from None
        origins = {key: self._origin(key, value) for key, value, _ in config.leaves()}
        return config.with_origins(origins)

    def _origin(self, key: str, value: Any) -> str:
        path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        place = self.places.get(path)
        if place is None or (value is not None and value_at(self.data, path) is None):  # null: the default
            return default_origin(key)
        return place.origin
