"""The regular expressions of a tokenizer: seen to be compiled in time before the tokenizer is loaded. Floor 2.

Compiling one may take hours (one that ignores case takes time with the square of its length, and more), in a library
that no signal of Python interrupts. So they are compiled in another process first, which can be ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex

from strop import time_limit
from strop.errors import ModelError

SECONDS = 10.0
"""Processor time for all patterns of a tokenizer; those of common ones take milliseconds."""

_PATTERN = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)
_HIDDEN = re.compile(rb"\\u00[4-7]")
"""A letter that is written as an escape, as nobody does who has nothing to hide: the key may be written so, too."""


def check_patterns(file: Path, where: str) -> None:
    """See that the patterns of tokenizer.json can be compiled. What is wrong with them otherwise is said where the
    tokenizer is loaded.

    Raises:
        ModelError: they take too much time or memory.
    """
    patterns = list(_patterns(file.read_bytes()))
    if not patterns:
        return
    try:
        time_limit.tried(_compile, patterns, seconds=SECONDS)
    except time_limit.TooMuch as limit:
        raise ModelError(
            f"the regular expressions in tokenizer.json take more than {limit} to be compiled",
            where=where,
            expected="some milliseconds and little memory",
            fix="look at the normalizer and pre_tokenizer in tokenizer.json before you trust it",
        ) from limit


def _patterns(content: bytes) -> Iterator[str]:
    """They are searched for in the bytes, since reading all of a large vocabulary takes as long as loading it."""
    if _HIDDEN.search(content):
        yield from _below(_json(content))
        return
    for match in _PATTERN.finditer(content):
        text = _json(match[1])
        if isinstance(text, str):
            yield text


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # the library that loads the file says what is wrong with it
        return None


def _below(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "Regex" and isinstance(inner, str):
                yield inner
            elif key != "vocab":
                yield from _below(inner)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):
                yield from _below(inner)


def _compile(patterns: list[str]) -> None:
    for pattern in patterns:
        Regex(pattern)
