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
    found, repeated = _value(text)
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
        are_messages = are_messages and (begins_as_messages or any(map(_has_known_role, found)))
    else:  # one object may be what an answer is meant to be, unless it is a turn by every sign
        are_messages = _is_message(found) and _has_known_role(found)
    return _unique(found, repeated, field) if are_messages else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(keys <= value.keys() for keys in KEYS)


def _has_known_role(message: Mapping[str, Any]) -> bool:
    return str(message.get("role", message.get("from"))) in ROLES


_NO_VALUE = object()

LONGEST = 1 << 24
"""Characters of a Python list: its parser takes hundreds of bytes for each."""


def _value(text: str) -> tuple[Any, list[str]]:
    """What a text holds, and the keys that an object in it has more than once."""
    repeated: list[str] = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(key for key in value if keys.count(key) > 1)
        return value

    decode = json.JSONDecoder(object_pairs_hook=as_object).decode
    for read in (decode, ast.literal_eval) if len(text) < LONGEST else (decode,):
        try:
            return read(text.strip().removeprefix("\ufeff").lstrip()), repeated
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            repeated.clear()
    return _NO_VALUE, []


def _unique(found: Any, repeated: list[str], field: str) -> Any:
    """What a text holds, where every key stands once."""
    if repeated:
        raise RowRefused(
            "duplicate_key",
            f"{field}: an object in this text has the key {repeated[0][:80]!r} twice",
            expected="every key once; which of the two is meant cannot be known",
        )
    return found


def parsed(value: Any, field: str) -> Any:
    """What a text says that is JSON, or a value as Python prints it.

    Raises:
        RowRefused: it is no JSON.
    """
    found, repeated = _value(value) if isinstance(value, str) else (_NO_VALUE, [])
    if found is _NO_VALUE:
        raise RowRefused("wrong_type", f"{field} is not JSON", expected="JSON", fix="write it by json.dumps")
    return _unique(found, repeated, field)


def object_in(text: str, field: str) -> dict[str, Any] | None:
    """The object that a text holds; None where it does not look like one, but like code, say.

    Raises:
        RowRefused: it looks like an object and cannot be read.
    """
    if OBJECT.match(text) is None or text.lstrip().startswith("["):
        return None
    found, repeated = _value(text)
    if isinstance(found, str):
        return object_in(found, field)  # written as JSON twice
    if not isinstance(found, dict):
        raise RowRefused(
            "invalid_json",
            f"{field} is a text that looks like an object, and it is neither JSON nor a Python dict ({text[:40]!r})",
            expected="an object, or its JSON as a text",
            fix="write it by json.dumps",
        )
    return dict(_unique(found, repeated, field))
