"""Columns beside the turns of a row: system text, tools, variables of the template, media, reasoning. Floor 2.

In: a row, and the prompt and completions that were read from it. Out: the prompt with its system turn; the tools; the
variables; and notes, by the names of `COUNTERS`, about columns that are not trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from strop.config.sections.dataset import bad_variable
from strop.data.read.row import RowRefused
from strop.data.shapes.json_columns import parsed
from strop.data.shapes.messages import OTHER_REASONING_KEYS, text_of, wrong_type
from strop.data.text.markers import REASONING_KEYS
from strop.types import Turns

TEMPLATE_KWARGS = "chat_template_kwargs"
"""Column with the row's own variables for the chat template."""

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns with the system text of a row."""

FUNCTIONS = "functions"
"""Column with the tools of a row in OpenAI's old form."""

MEDIA = re.compile(r"(?:.*_)?(?:image|img|picture|video|audio|sound)s?(?:_(?:path|file|url|id|name|byte)s?)?", re.I)
"""Names of columns with images, videos or sounds, or with where they are."""

PLACEHOLDER = re.compile(
    r"<\|?(?:start_of_)?(?:image|img|video|audio|sound)(?:[_ ]?(?:pad|placeholder|token|soft_token|\d+))?\|?>"
    r"|\[(?:image|img|video|audio)\]",
    re.I,
)
"""How a text points to what stands in such a column."""

REASONING = frozenset({*REASONING_KEYS, *OTHER_REASONING_KEYS})
"""Columns in which rows have reasoning that belongs into a message."""


def with_system(
    row: Mapping[str, Any], named: Collection[str], prompt: Turns, completions: tuple[Turns, ...], notes: list[str]
) -> tuple[Turns, tuple[Turns, ...]]:
    """The turns with the text of the row's system column as the first one, unless its messages have one.

    Args:
        named: columns that the configuration reads as something else.

    Raises:
        RowRefused: it is no text, or there are two.
    """
    there = [key for key in SYSTEM if key in row and key not in named]
    if not there or prompt == "":  # a text without turns is whole as it is
        return prompt, completions
    found: dict[str, str] = {}
    for key in there:
        words = row[key]
        if words is not None and not isinstance(words, str):
            raise RowRefused("wrong_type", f"{key} is no text", expected="a text, null, or nothing")
        if words and words.strip():
            found.setdefault(text_of(words, key), key)
    if len(found) > 1:
        names = " and ".join(found.values())
        raise RowRefused("wrong_shape", f"{names} hold two system texts", expected="one of them")
    # blank or not: rows of one file are all messages, so that all are rendered alike
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
        completions = tuple(({"role": "assistant", "content": c},) for c in completions)
    words, first = next(iter(found), None), next(iter(prompt), None)
    if words is None:
        return prompt, completions
    if first is None or first["role"] not in ("system", "developer"):
        return ({"role": "system", "content": words}, *prompt), completions
    if first["content"].strip() != words.strip():
        notes.append("system_unused")
    return prompt, completions


def note_media(row: Mapping[str, Any], parts: tuple[Turns, ...], notes: list[str]) -> None:
    """Count images and the like.

    Raises:
        RowRefused: a text points to one: it is a part of the row, and it is not trained.
    """
    for name in [name for name in row if _is_media(name)]:
        value = row[name]
        if not isinstance(value, str | bytes | list | tuple | Mapping) or value in ("", [], (), {}):
            continue
        if "media_unread" not in notes:
            notes.append("media_unread")
        texts = [turn.get("content", "") for part in parts if not isinstance(part, str) for turn in part]
        texts += [part for part in parts if isinstance(part, str)]
        if match := next(filter(None, map(PLACEHOLDER.search, texts)), None):
            raise RowRefused(
                "unsupported_modality",
                f"{match[0]!r} in the row's text points to its column {name!r}, which is not trained",
                expected="rows that are text alone",
            )


@lru_cache(maxsize=4096)
def _is_media(name: str) -> bool:
    return MEDIA.fullmatch(name) is not None


def note_reasoning(row: Mapping[str, Any], named: Collection[str], notes: list[str]) -> None:
    """Count a column of reasoning; one word in it (`on`, `high`) is a setting, and no reasoning."""
    for key in REASONING & row.keys():
        if key not in named and isinstance(row[key], str) and len(row[key].split(maxsplit=1)) > 1:
            notes.append("reasoning_unread")
            return


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a row; None where it has none.

    Raises:
        RowRefused: they are no list of objects.
    """
    tools = row.get("tools") or (_functions(row[FUNCTIONS]) if FUNCTIONS in row else None)
    if not tools:
        return None
    if isinstance(tools, list | tuple):
        tools = [parsed(tool, f"tools[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(tools)]
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise wrong_type("tools", tools, "a list of objects, one per tool")
    return tuple(tools)


def _functions(value: Any) -> Any:
    """Functions with a name each; a column of that name can hold anything else, which is not looked at."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    are_tools = isinstance(value, list | tuple) and all(isinstance(f, Mapping) and "name" in f for f in value)
    return value if are_tools else None


def template_kwargs_of(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row's own variables of the chat template; None where it has none.

    Raises:
        RowRefused: they are none that a template can have.
    """
    found = row.get(TEMPLATE_KWARGS)
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise wrong_type(TEMPLATE_KWARGS, found, 'an object, such as {"enable_thinking": false}')
    for name, value in found.items():
        if (problem := bad_variable(name, value)) is not None:
            raise RowRefused(
                "wrong_type", f"{TEMPLATE_KWARGS}: {problem}", expected="the template's own variables, as JSON"
            )
    return found
