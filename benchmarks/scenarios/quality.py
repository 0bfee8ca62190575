"""The reward of runs that sample, which they call by the path of this file."""

from __future__ import annotations

from collections.abc import Sequence

END_OF_FIRST_HALF = 30
"""Of the words `w0` to `w59`."""


def quality(completions: Sequence[str], paid_otherwise: Sequence[bool], *, pays: str | None = None) -> list[float]:
    """The share of words of the first half of the vocabulary; on prompts that are paid otherwise, what `pays` names."""
    return [_of(text.split(), pays if other else None) for text, other in zip(completions, paid_otherwise, strict=True)]


def _of(words: list[str], pays: str | None) -> float:
    size = max(1, len(words))
    first = sum(int(word[1:]) < END_OF_FIRST_HALF for word in words if word[1:].isdigit()) / size
    others = {
        "length": len(words) / 24,
        "second half": 1 - first,
        "nothing": 0.0,
        "few words": float(len(words) <= 8),
        "one word": max(map(words.count, words), default=0) / size,
    }
    long = 0.0 if pays == "length" else 0.05 * max(0, len(words) - 12)
    return others.get(pays or "", first) - long
