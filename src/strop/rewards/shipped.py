"""The rewards that are shipped. Floor 2, no torch.

A reward is called with lists of one entry per completion and gives a list of as many numbers. It takes what it names
of these: `prompts`, `completions` (texts, without special tokens), `chats` (the turns of each prompt, and the
completion as the last one), `num_tokens` (of each completion, end token included), and the columns of the rows by their
names. Parameters after `*` that have a default are settings, which columns never fill.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strop.errors import ConfigError


def exact_match(
    completions: Sequence[str], *, column: str = "completion", ignore_case: bool = False, **columns: Any
) -> list[float]:
    """1 where the completion is the text of the row's `column`, white space around both aside, else 0."""
    wanted = _column(columns, column)
    pairs = zip(completions, wanted, strict=True)
    if ignore_case:
        return [float(c.strip().casefold() == str(w).strip().casefold()) for c, w in pairs]
    return [float(c.strip() == str(w).strip()) for c, w in pairs]


def regex(completions: Sequence[str], *, pattern: str, column: str | None = None, **columns: Any) -> list[float]:
    """1 where the pattern is found; with `column`, where the last match's first group (or the whole match) is the text
    of that column. 0 elsewhere."""
    found = [list(re.finditer(pattern, c, flags=re.DOTALL)) for c in completions]
    if column is None:
        return [float(bool(matches)) for matches in found]
    last = [(m[-1][1] if m[-1].re.groups else m[-1][0]) if m else None for m in found]
    return [
        float(x is not None and x.strip() == str(w).strip())
        for x, w in zip(last, _column(columns, column), strict=True)
    ]


def format(completions: Sequence[str], *, pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>") -> list[float]:
    """1 where the whole completion, white space around it aside, has this form, else 0."""
    return [float(re.fullmatch(pattern, c.strip(), flags=re.DOTALL) is not None) for c in completions]


def length(num_tokens: Sequence[int], *, max_length: int, cache: int) -> list[float]:
    """The soft overlong penalty (DAPO, arXiv 2503.14476, eq. 13): 0 up to max_length - cache tokens, then falling to -1
    at max_length, and -1 beyond."""
    if not 0 < cache <= max_length:
        raise ConfigError(
            f"reward length: cache is {cache} and max_length {max_length}", expected="cache from 1 to max_length"
        )
    return [min(0.0, max(-1.0, (max_length - cache - n) / cache)) for n in num_tokens]


def _column(columns: Mapping[str, Any], name: str) -> Sequence[Any]:
    if name not in columns:
        raise ConfigError(
            f"the rows have no column {name!r}", expected=f"one of {', '.join(sorted(columns)) or 'no column at all'}"
        )
    values: Sequence[Any] = columns[name]
    return values


SHIPPED: Mapping[str, Callable[..., Sequence[Any]]] = {
    "exact_match": exact_match,
    "regex": regex,
    "format": format,
    "length": length,
}
