"""What becomes of a key of another tool, and the ways in which most keys are answered. Floor 2, no torch.

In: a value, and a view of the whole file. Out: a `KeyAnswer`: the keys of strop that it sets, and what is said of it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from strop.config.other_tools import key_of
from strop.config.schema import Key, key_at
from strop.config.yamlfile import KeyPath, scalar
from strop.errors import ConfigError
from strop.readable import is_number


class Fate(StrEnum):
    """What becomes of a key."""

    CARRIED = "carried over"
    """The same value, under strop's name."""
    TRANSLATED = "translated"
    """Another value, several keys, or nothing to set because strop does so anyway."""
    LEFT = "not carried over"
    """Nothing of strop does this; the run will differ, as the answer says."""


@dataclass(frozen=True)
class KeyAnswer:
    """What becomes of one key. values: dotted keys of strop, and what they are set to. why: said to the reader."""

    fate: Fate
    values: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


class Code:
    """A value of a Python file that is no literal: its text. It is not run."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def parts(self) -> list[Any]:
        """The elements of a list or tuple: texts, and `Code` for what is no text; else the whole alone."""
        try:
            tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return [self]  # it was cut short
        parts = tree.elts if isinstance(tree, ast.List | ast.Tuple) else []
        return [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else Code(ast.unparse(p))
                for p in parts] or [self]  # fmt: skip


@dataclass(frozen=True)
class View:
    """The whole file, as a rule may look at it.

    given: values by the last part of their names, nulls left out; and the names of a script's calls, true. defaults:
    what the tool takes for names that are not given. folder: where the file lies.
    """

    tool: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    method: str
    folder: Path

    def get(self, name: str, default: Any = None) -> Any:
        """The value that the tool would use."""
        value = self.given.get(name)
        return value if value is not None else self.defaults.get(name, default)

    def evaluates(self) -> bool:
        """Whether the tool evaluates while it trains."""
        return str(self.get("eval_strategy", self.get("evaluation_strategy", "no"))).lower() not in ("no", "false")


Rule = Callable[[Any, View], "KeyAnswer | Mapping[KeyPath, KeyAnswer]"]
"""Answers a key; a key with keys below it may be answered one by one, by their paths below it."""
Rules = Mapping[str, Rule]


def carried(key: str, value: Any) -> KeyAnswer:
    """The same value, if strop's key takes it."""
    return _set(Fate.CARRIED, {key: value})


def translated(values: Mapping[str, Any], why: str = "") -> KeyAnswer:
    """Other values, if strop's keys take them."""
    return _set(Fate.TRANSLATED, values, why)


def left(why: str) -> KeyAnswer:
    """Not carried over. why: what differs without it."""
    return KeyAnswer(Fate.LEFT, {}, why)


def idle(why: str) -> KeyAnswer:
    """Nothing to set: strop does so anyway, or it changes no result."""
    return KeyAnswer(Fate.TRANSLATED, {}, why)


def _set(fate: Fate, values: Mapping[str, Any], why: str = "") -> KeyAnswer:
    fitted = {}
    for key, value in values.items():
        if isinstance(value, Code):
            name = key.rpartition(".")[2].replace("_", "-")
            return left(f"it is code, which is not run: give its value beside the file, --{name} VALUE")
        try:
            fitted[key] = coerced(key, value)
        except ValueError as error:
            return left(f"{key} of strop takes {error}")
    return KeyAnswer(fate, fitted, why)


# ---- rules


def same(key: str) -> Rule:
    """The rule of a name that means the same as a key of strop."""
    return lambda value, _: carried(key, value)


def straight(names: str) -> Rules:
    """The rules of names that mean the same as the key of strop to which `strop.config.other_tools` leads them."""
    return {name: same(key_of(name)) for name in names.split()}


def of_4_bits(name: str) -> Rule:
    """The rule of a setting of bitsandbytes that is read with 4 bits alone."""

    def rule(value: Any, view: View) -> KeyAnswer:
        four = is_on(view.get("load_in_4bit")) or whole(view.get("quantization_bit")) == 4
        return carried(key_of(name), value) if four else idle("the base is not in 4 bits")

    return rule


def of_methods(name: str, *methods: str) -> Rule:
    """The rule of a setting of `post_training` that the tool reads for these methods alone."""

    def rule(value: Any, view: View) -> KeyAnswer:
        if view.method in methods:
            return carried(f"post_training.{name}", value)
        return idle(f"method {view.method} does not read it")

    return rule


def simpo_gamma(beta_name: str) -> Rule:
    """The rule of a target margin of SimPO, which tools give in units of the loss and strop per unit of beta.

    Args:
        beta_name: what the tool calls beta.
    """

    def rule(value: Any, view: View) -> KeyAnswer:
        beta, gamma = real(view.get(beta_name)), real(value)
        if view.method != "simpo" or not beta or gamma is None:
            return idle(f"method {view.method} does not read it")
        return translated({"post_training.simpo_gamma": gamma / beta}, "gamma per unit of beta")

    return rule


def packing(value: Any, view: View) -> KeyAnswer:
    """The rule of a switch for packing, which strop has for sft."""
    return carried("training.packing", value) if view.method == "sft" else idle("pairs share their prompts unpadded")


def validation_size(value: Any, view: View) -> KeyAnswer:
    """The rule of what is held out: a share of the rows, or from 1 on a number of them."""
    size = real(value)
    if size is not None and size >= 1:
        return left("it counts rows; strop holds out a share, dataset.validation_split")
    return translated({"dataset.validation_split": value})


def chosen(key: str, choices: Mapping[Any, Any], otherwise: str) -> Rule:
    """The rule of a name whose values have other names. otherwise: said where there is no such value."""

    def rule(value: Any, _: View) -> KeyAnswer:
        text = value.lower() if isinstance(value, str) else value
        if isinstance(text, list | dict) or text not in choices:
            return left(otherwise)
        ours = choices[text]
        return carried(key, ours) if ours == value else translated({key: ours})

    return rule


def always(why: str) -> Rule:
    """The rule of a name for what strop does anyway, or of what changes no result."""
    return lambda value, view: idle(why)


def only(wanted: Iterable[Any], why: str, otherwise: str) -> Rule:
    """The rule of a name for which strop has no key: for the wanted values it does so anyway."""
    accepted = list(wanted)

    def rule(value: Any, _: View) -> KeyAnswer:
        text = value.lower() if isinstance(value, str) else value
        return (
            idle(why)
            if any(text == w and isinstance(text, bool) == isinstance(w, bool) for w in accepted)
            else left(otherwise)
        )

    return rule


def off(otherwise: str) -> Rule:
    """The rule of a name that asks for something that strop does not have, unless it is switched off."""
    return only((False, 0, "", "no", "none", "false"), "it is off, and strop has none", otherwise)


def absent(names: str, otherwise: str) -> Rules:
    """`off` for several names."""
    return {name: off(otherwise) for name in names.split()}


def listed(key: str, names: Mapping[str, Any] | None = None) -> Rule:
    """The rule of a list of names, given as a list or as `a,b,c`; a name in `names` stands for the whole value."""

    def rule(value: Any, _: View) -> KeyAnswer:
        words = [w.strip() for w in value.split(",") if w.strip()] if isinstance(value, str) else value
        if isinstance(words, list) and len(words) == 1 and str(words[0]) in (names or {}):
            return translated({key: (names or {})[str(words[0])]})
        return carried(key, words) if words == value else translated({key: words})

    return rule


def refused(what: str, value: Any, where: str, expected: str, fix: str) -> ConfigError:
    """A value without which the run would train something else."""
    return ConfigError(f"{what} is {value!r}"[:200], where=where, expected=expected, fix=fix)


# ---- values


def schema_key(dotted: str, method: str | None = None) -> Key | None:
    """The key of strop at `section.key`."""
    return key_at(tuple(int(part) if part.isdecimal() else part for part in dotted.split(".")), method)


def coerced(dotted: str, value: Any) -> Any:
    """A value as strop's key takes it: `5e-7` of YAML 1.1, which is a text there, as a number; 3.0 epochs as 3.

    Raises:
        ValueError: the key does not take it; the message says what it takes.
    """
    key = schema_key(dotted)
    assert key is not None, dotted
    value = _typed(key, value)
    for adapter in _adapters(dotted):
        try:
            adapter.validate_python(value, strict=True)
            return value
        except ValidationError:
            continue
    raise ValueError(key.expected)


def _typed(key: Key, value: Any) -> Any:
    kinds = key.kinds
    if isinstance(value, str) and bool in kinds and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if isinstance(value, str) and str not in kinds and value not in key.choices:
        value = scalar(value.strip())
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if is_number(value) and str in kinds and not kinds & {int, float}:
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value) if abs(value) < 1 << 53 else value
    if isinstance(value, str) and tuple in kinds and str not in kinds:
        return [value]
    return list(value) if isinstance(value, tuple) else value


_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@cache
def _adapters(dotted: str) -> tuple[TypeAdapter[Any], ...]:
    """What checks a value: one check, or for a setting one of each method that reads it."""
    key = schema_key(dotted)
    assert key is not None
    found = []
    for method in key.methods if key.section == "post_training" else (None,):
        own = schema_key(dotted, method) or key
        kind: Any = own.field.annotation
        for bound in own.field.metadata:
            kind = Annotated[kind, bound]
        found.append(TypeAdapter(kind))
    return tuple(found)


def whole(value: Any) -> int | None:
    """A whole number, also where it is written as 3.0 or as a text; None: it is none."""
    number = scalar(value.strip()) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return int(number) if number == int(number) else None


def real(value: Any) -> float | None:
    """A finite number, also where it is written as a text; None: it is none."""
    number = scalar(value.strip()) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return float(number) if abs(number) < float("inf") else None


def is_on(value: Any) -> bool:
    """Whether a switch is on, in the words of YAML 1.1 too."""
    return _WORDS.get(value.lower(), False) if isinstance(value, str) else value is True
