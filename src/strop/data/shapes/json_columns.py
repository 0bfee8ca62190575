"""Columns that hold JSON as a text, read as what it says. Floor 2.

CSV files have texts only, and Arrow tables often keep conversations so, since a column of theirs has one type.
In: a text. Out: what it holds, where that is messages or tools; a text that is none is left a text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from strop.data.read.row import RowRefused

MESSAGES = re.compile(r"""[\s\ufeff]*\[?\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
"""How a list of messages begins, or a message, as JSON or as Python writes it."""

OBJECT = re.compile(r"""[\s\ufeff]*"?\s*\[?\s*\{""")
"""How any list of objects begins, also one whose JSON was written as JSON once more."""

ROLE = re.compile(r"""["'](?:role|from)\\?["']\s*:""")
"""A key that every message has."""

ROLES = frozenset({"system", "user", "assistant", "tool", "human", "gpt"})

KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""What a message has, of one shape or another."""


def messages_in(text: str, field: str) -> Any:
    """The messages that the text holds; None where it is a text like any other.

    Args:
        field: the column, for messages to people.

    Raises:
        RowRefused: it is messages in a form that cannot be read.
    """
    begins_as_messages = MESSAGES.match(text) is not None
    if not begins_as_messages and (OBJECT.match(text) is None or ROLE.search(text) is None):
        return None
    found = _value(text)
    if isinstance(found, str):
        return messages_in(found, field)  # written as JSON twice
    if found is _NO_VALUE:
        if not begins_as_messages or not text.rstrip().endswith(("]", "}")):
            return None  # an answer may begin so and go on in words
        raise RowRefused(
            "invalid_json",
            f"{field} is a text that looks like messages, and it is neither JSON nor a Python list",
            expected="messages, or their JSON as a text",
            fix="write the column by json.dumps (str() of a numpy array cannot be read again)",
        )
    if isinstance(found, list):
        are_messages = bool(found) and all(map(_is_message, found))
        return found if are_messages and (begins_as_messages or any(map(_has_known_role, found))) else None
    # one object may be what an answer is meant to be, unless it is a turn by every sign
    return found if _is_message(found) and _has_known_role(found) else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(keys <= value.keys() for keys in KEYS)


def _has_known_role(message: Mapping[str, Any]) -> bool:
    return str(message.get("role", message.get("from"))) in ROLES


_NO_VALUE = object()

LONGEST = 1 << 24
"""Characters of a Python list: its parser takes hundreds of bytes for each."""


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval) if len(text) < LONGEST else (json.loads,):
        try:
            return read(text.strip().removeprefix("\ufeff").lstrip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return _NO_VALUE


def parsed(value: Any, field: str) -> Any:
    """What a text says that is JSON, or a value as Python prints it.

    Raises:
        RowRefused: it is no JSON.
    """
    found = _value(value) if isinstance(value, str) else _NO_VALUE
    if found is _NO_VALUE:
        raise RowRefused("wrong_type", f"{field} is not JSON", expected="JSON", fix="write it by json.dumps")
    return found
