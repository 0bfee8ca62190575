"""The tools whose files are read, and how a file is recognised. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from strop.config.schema import SECTIONS
from strop.errors import ConfigError
from strop.importers import axolotl, llamafactory, trl, unsloth
from strop.importers.foreign_file import ForeignFile
from strop.importers.key_answers import Rules, View


@dataclass(frozen=True)
class Tool:
    """What is known of a tool.

    method_of: the method that a file is for, from its values and the calls of a script; empty: it does not say.
    defaults: what the tool takes for names that are not given, from the method, the values and the type of the model.
    decided: keys of strop that follow from the tool's definitions. notes: what means something else.
    """

    title: str
    rules: Rules
    method_of: Callable[[Mapping[str, Any], tuple[str, ...]], str]
    defaults: Callable[[str, Mapping[str, Any], str], Mapping[str, Any]]
    decided: Callable[[View], Iterator[tuple[str, Any]]]
    notes: Callable[[View], Iterator[str]]


TOOLS: Mapping[str, Tool] = {
    "trl": Tool("TRL", trl.RULES, trl.method_of, trl.defaults, trl.decided, trl.notes),
    "llamafactory": Tool(
        "LLaMA-Factory",
        llamafactory.RULES,
        llamafactory.method_of,
        llamafactory.defaults,
        llamafactory.decided,
        llamafactory.notes,
    ),
    "axolotl": Tool("axolotl", axolotl.RULES, axolotl.method_of, axolotl.defaults, axolotl.decided, axolotl.notes),
    "unsloth": Tool("unsloth", unsloth.RULES, trl.method_of, unsloth.defaults, unsloth.decided, trl.notes),
    "opensloth": Tool(
        "OpenSloth",
        unsloth.OPENSLOTH,
        unsloth.method_of_opensloth,
        unsloth.defaults_of_opensloth,
        unsloth.decided,
        trl.notes,
    ),
}
MARKS: Mapping[str, frozenset[str]] = {
    "opensloth": frozenset({"OpenSlothConfig", "FastModelArgs", "fast_model_args", "opensloth_config"}),
    "unsloth": frozenset({"unsloth", "get_peft_model"}),
}
"""Packages, calls and keys that only one tool has, by which its files are recognised. Those of the other tools are
recognised by how many of their keys a tool knows."""
LITTLE = 3
"""Keys that a file must share with a tool to be taken for one of its files, or half of its keys if they are fewer."""


def recognised(source: ForeignFile, names: Sequence[str]) -> str:
    """The tool that a file is for.

    Raises:
        ConfigError: it is for none, or could be for several.
    """
    seen = {*source.imported, *(call.partition(" ")[0] for call in source.data)}
    if "peft" in source.imported:
        seen.discard("get_peft_model")  # peft has a function of that name, too
    for tool, marks in MARKS.items():
        if marks & seen:
            return tool
    if source.groups:
        return "trl"
    if "models" in source.data and set(source.data) <= {*SECTIONS, *SECTIONS[""], "preset"}:
        raise ConfigError(
            "this is a configuration of strop already",
            where=str(source.path),
            fix=f"strop train --config {quote(str(source.path))}",
        )
    scores = {tool: sum(name in TOOLS[tool].rules for name in names) for tool in TOOLS if tool not in MARKS}
    best = max(scores.values())
    first = [tool for tool, score in scores.items() if score == best]
    if best < min(LITTLE, len(names) / 2) or best == 0:
        raise ConfigError(
            "this is a file of none of the tools that are known",
            where=str(source.path),
            expected=f"a configuration of {', '.join(tool.title for tool in TOOLS.values())}",
            fix=f"name the tool if it is one of them: --from {'|'.join(TOOLS)}",
        )
    if len(first) > 1:
        raise ConfigError(
            f"this could be a file of {' or '.join(TOOLS[tool].title for tool in first)}",
            where=str(source.path),
            fix=f"add --from {'|'.join(first)}",
        )
    return first[0]
