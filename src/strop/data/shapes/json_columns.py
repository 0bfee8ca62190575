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

MESSAGES = re.compile(r"""\s*\[?\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
"""How a list of messages begins, or a message, as JSON or as Python writes it."""

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
    if not MESSAGES.match(text):
        return None
    found = _value(text)
    if found is _NO_VALUE:
        if not text.rstrip().endswith(("]", "}")):
            return None  # an answer may begin so and go on in words
        raise RowRefused(
            "invalid_json",
            f"{field} is a text that looks like messages, and it is neither JSON nor a Python list",
            expected="messages, or their JSON as a text",
            fix="write the column by json.dumps (str() of a numpy array cannot be read again)",
        )
    if isinstance(found, list):
        return found if found and all(map(_is_message, found)) else None
    # one object may be what an answer is meant to be, unless it is a turn by every sign
    return found if _is_message(found) and str(found.get("role", found.get("from"))) in ROLES else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(keys <= value.keys() for keys in KEYS)


_NO_VALUE = object()

LONGEST = 1 << 24
"""Characters of a Python list: its parser takes hundreds of bytes for each."""


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval) if len(text) < LONGEST else (json.loads,):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return _NO_VALUE


def parsed(value: Any, field: str) -> Any:
    """What a JSON text says.

    Raises:
        RowRefused: it is no JSON.
    """
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowRefused("wrong_type", f"{field} is not JSON", expected="JSON") from error
