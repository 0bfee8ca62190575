"""A file's keys, answered one by one. Floor 2, no torch.

In: a file, perhaps the tool's name, and keys of strop that are given beside it. Out: `Imported`. Every key of the file
is in one of three lists, or there is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from strop.config import RunConfig, load_config
from strop.config.other_tools import NEEDLESS, RENAMED, instead_of
from strop.config.yamlfile import KeyPath, dotted, write_value
from strop.errors import ConfigError
from strop.importers.foreign_file import ForeignFile, leaves, read
from strop.importers.key_answers import Code, Fate, KeyAnswer, Rule, View, coerced, idle, left, schema_key
from strop.importers.tools import TOOLS, Tool, recognised
from strop.importers.trl import model_type

METHOD = "post_training.method"


@dataclass(frozen=True)
class Entry:
    """A key of the file, as it is named there, and what becomes of it."""

    key: str
    value: Any
    answer: KeyAnswer


@dataclass(frozen=True)
class Imported:
    """values: dotted keys of strop. origins: where each comes from, in words. notes: what means something else."""

    tool: str
    path: Path
    method: str
    entries: tuple[Entry, ...]
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    notes: tuple[str, ...]

    def of(self, fate: Fate) -> list[Entry]:
        """The keys with this fate, in the order of the file."""
        return [entry for entry in self.entries if entry.answer.fate is fate]


def import_file(path: Path, tool: str | None = None, overrides: Mapping[str, Any] | None = None) -> Imported:
    """Reads a file of another tool.

    Args:
        tool: one of `TOOLS`; None: recognised by its keys.
        overrides: dotted keys of strop to values, which win over the file.

    Raises:
        ConfigError: the file cannot be read, is of no known tool, or lacks what a run needs.
    """
    try:
        return _imported(path, tool, dict(overrides or {}))
    except ConfigError as error:
        if error.where.startswith(str(path)[:200]):
            raise
        raise ConfigError(error.found, where=str(path), expected=error.expected, fix=error.fix) from None


def _imported(path: Path, tool: str | None, overrides: dict[str, Any]) -> Imported:
    source = read(path)
    items = list(_items(source))
    name = tool or recognised(source, [item[1] for item in items])
    known = TOOLS[name]
    view = _view(name, known, source, items, overrides)
    entries = _answered(items, known, view, overrides)
    values, origins = _gathered(entries, known, view)
    for key, value in overrides.items():
        values[key], origins[key] = value, "given beside the file"
    values[METHOD] = view.method
    origins.setdefault(METHOD, "the method of the file")
    _check(values, path, [e for e in entries if e.key in ("dataset", "datasets") and e.answer.fate is Fate.LEFT])
    return Imported(
        known.title, path, view.method, tuple(entries), values, origins, tuple(dict.fromkeys(known.notes(view)))
    )


# ---- the file


def _items(source: ForeignFile) -> Iterator[tuple[KeyPath, str, Any]]:
    """(path, name to look up, value) of every key at the top, or of every argument of every call."""
    if source.groups:
        for call, arguments in source.data.items():
            yield from (((call, name), name, value) for name, value in arguments.items())
    else:
        yield from (((name,), name, value) for name, value in source.data.items())


def _view(
    name: str, tool: Tool, source: ForeignFile, items: list[tuple[KeyPath, str, Any]], overrides: Mapping[str, Any]
) -> View:
    given: dict[str, Any] = {}
    for _, key, value in items:
        if value is not None:
            given.setdefault(key, value)
    if source.groups:
        given |= {call.partition(" ")[0]: True for call in source.data}
    method = overrides.get(METHOD) or tool.method_of(given, tuple(source.data) if source.groups else ())
    if not method:
        raise ConfigError(
            "the file does not say which method it is for",
            where=str(source.path),
            fix="name it: --method sft, dpo, kto, orpo, simpo, cpo or grpo",
        )
    model = given.get("model_name_or_path") or given.get("base_model") or given.get("model_name") or given.get("model")
    model = overrides.get("models.0.huggingface_id") or model
    kind = model_type(model) if isinstance(model, str) else ""
    return View(name, given, tool.defaults(method, given, kind), method, source.path.parent)


# ---- the answers


def _answered(
    items: list[tuple[KeyPath, str, Any]], tool: Tool, view: View, overrides: Mapping[str, Any]
) -> list[Entry]:
    entries: list[Entry] = []
    said: dict[str, str] = {}
    for path, name, value in items:
        for leaf, item, answer in _answers(path, name, value, tool.rules.get(name), view):
            key = dotted(leaf)
            if name in ("dataset", "datasets") and not answer.values and any(f"dataset.{k}" in overrides for k in DATA):
                answer = left("other rows are named beside the file")
            elif any(k in overrides for k in answer.values):
                kept = {k: v for k, v in answer.values.items() if k not in overrides}
                answer = KeyAnswer(Fate.LEFT, kept, "another value is given beside the file")
            elif twice := [k for k in answer.values if said.get(k, key) != key and not _same(entries, k, answer)]:
                answer = left(f"{said[twice[0]]} says {twice[0]} already")
            for k in answer.values:
                said.setdefault(k, key)
            entries.append(Entry(key, item, answer))
    return entries


def _same(entries: list[Entry], key: str, answer: KeyAnswer) -> bool:
    return all(e.answer.values[key] == answer.values[key] for e in entries if key in e.answer.values)


def _answers(
    path: KeyPath, name: str, value: Any, rule: Rule | None, view: View
) -> Iterator[tuple[KeyPath, Any, KeyAnswer]]:
    """Every key at or below a path, with its answer."""
    found: KeyAnswer | Mapping[KeyPath, KeyAnswer] = {}
    if rule is not None and (value is not None or name in NULL_SAYS.get(view.tool, ())):
        found = rule(value, view)
    if isinstance(found, KeyAnswer):
        below = list(leaves(value, path)) if isinstance(value, Mapping | list) else [(path, value)]
        first, *others = below
        yield first[0], first[1], found
        yield from ((leaf, item, KeyAnswer(found.fate, {}, found.why)) for leaf, item in others)
        return
    for leaf, item in leaves(value, path):
        yield leaf, item, found.get(leaf[len(path) :]) or _unknown(leaf, item)


def _unknown(path: KeyPath, value: Any) -> KeyAnswer:
    """The answer to a key without a rule."""
    if value is None:
        return idle("nothing is said")
    for part in reversed(path):
        name = str(part)
        if instead := instead_of(name):
            if value in (False, 0, "", "no", "none", "false") or value == [] or value == {}:
                return idle("it is off, and strop has none")
            return idle(instead) if instead in NEEDLESS else left(instead)
        if name in RENAMED:
            return left(f"see {RENAMED[name]} in docs/configuration.md")
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            return left(PREFIXES[prefix])
    if isinstance(value, Code):
        return left("it is code, which is not run")
    return left("strop has no such setting")


NULL_SAYS: Mapping[str, tuple[str, ...]] = dict.fromkeys(("trl", "unsloth"), ("max_length",))
"""Names by tool whose null is no default: null tokens at most are as many as there are."""

PREFIXES: Mapping[str, str] = {
    "vllm_": "it is a setting of vLLM itself: give it to `vllm serve`, if rollout.sampler is vllm",
    "wandb_": instead_of("wandb_entity"),
    "hub_": instead_of("hub_token"),
    "ddp_": instead_of("ddp_timeout"),
    "fsdp_": instead_of("fsdp_config"),
    "liger_": instead_of("use_liger"),
    "lora_": "strop has no such setting for its adapters",
}
"""Families of names, and what stands for them."""


# ---- the values


def _gathered(entries: list[Entry], tool: Tool, view: View) -> tuple[dict[str, Any], dict[str, str]]:
    """What is set, and where each comes from: the file, then the tool's defaults where they differ from strop's."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for entry in entries:
        for key, value in entry.answer.values.items():
            if key not in values:
                values[key], origins[key] = value, entry.key
    for name, value in view.defaults.items():
        rule = tool.rules.get(name)
        if name in view.given or rule is None:
            continue
        answer = rule(value, view)
        for key, ours in answer.values.items() if isinstance(answer, KeyAnswer) else ():
            if key not in values and not _default_here(key, ours, view.method) and not _ruled_out(key, values):
                values[key], origins[key] = ours, f"{tool.title}'s default"
    for key, value in tool.decided(view):
        if key not in values and not _default_here(key, value, view.method):
            values[key], origins[key] = coerced(key, value), f"as {tool.title} defines it"
    return values, origins


def _ruled_out(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a default would contradict what the file says."""
    pairs = (("training.warmup_steps", "training.warmup_ratio"), ("training.bf16", "training.fp16"))
    others = [b for a, b in (*pairs, *((b, a) for a, b in pairs)) if a == key]
    return any(values.get(other) not in (None, False) for other in others) or (
        key.startswith("training.bf16") and bool(values.get("training.auto_precision"))
    )


def _default_here(key: str, value: Any, method: str) -> bool:
    """Whether strop takes this value by itself."""
    known = schema_key(key, method)
    if known is None or known.extra("x-default"):
        return False
    return known.field.default is not PydanticUndefined and bool(known.field.default == value)


DATA = ("train_file", "name", "sources", "splits_dir")
"""Keys of `dataset` that say where rows are."""


def _check(values: Mapping[str, Any], path: Path, of_data: list[Entry]) -> RunConfig:
    """Refuses what would not be a configuration, in the words of the file that was read.

    of_data: keys of the file that name its rows, and are not carried over.
    """
    where = str(path)
    if "models.0.huggingface_id" not in values:
        raise ConfigError("the file names no model", where=where, fix="name it: --model org/name, or a folder")
    if not any(f"dataset.{key}" in values for key in DATA):
        raise ConfigError(
            "the file names no data that strop can read" + "".join(f"; {e.key}: {e.answer.why}" for e in of_data),
            where=where,
            fix=f"name the rows beside it: strop import {path} --train-file rows.jsonl",
        )
    if values[METHOD] == "grpo" and not values.get("rewards"):
        raise ConfigError(
            "no reward of the file can be carried over",
            where=where,
            fix="name one: --rewards exact_match, or --rewards file.py:function (docs/methods/grpo.md)",
        )
    try:
        return load_config(overrides=nested(values))
    except ConfigError as error:
        raise ConfigError(
            f"what was read makes no configuration: {error.found}",
            where=where,
            expected=error.expected,
            fix=error.fix or "give another value beside the file, as in --lora.enabled true",
        ) from None


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section.startswith("models"):
            found.setdefault("models", [{}])[0][name] = value
        elif section:
            found.setdefault(section, {})[name] = value
        else:
            found[key] = value
    return found


def in_words(value: Any) -> str:
    """A value of the file on one line, short."""
    text = repr(value) if isinstance(value, Code) else write_value(value)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 70 else text[:70] + "..."
