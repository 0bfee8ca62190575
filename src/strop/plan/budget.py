"""Tokens of a micro-batch, where nobody says. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence

from strop.lengths import Sized, lengths_of
from strop.plan.tokens import RowTokens

CPU_TOKENS = 2048
"""Tokens of a micro-batch up to which a CPU gains: larger ones only take more memory. Short rows of a small model took
1.8 times as long in micro-batches of 130 tokens."""


def default_budget(groups: Sequence[Sized], batch_size: int, tokens: RowTokens, device_type: str) -> int:
    """By the longest of the groups."""
    return batch_budget(batch_size, longest_group(groups, tokens), device_type)


def longest_group(groups: Sequence[Sized], tokens: RowTokens) -> int:
    """Tokens of the group that costs the most."""
    return int(tokens.of_each(lengths_of(groups)).max())


def batch_budget(batch_size: int, longest: int, device_type: str) -> int:
    """On a GPU what `batch_size` of the longest cost; on a CPU `CPU_TOKENS`, or the longest."""
    return max(longest, CPU_TOKENS) if device_type == "cpu" else batch_size * longest
