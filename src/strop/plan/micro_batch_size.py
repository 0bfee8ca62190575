"""The default size of a micro-batch, in tokens. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence

from strop.lengths import Sized, lengths_of
from strop.plan.row_tokens import RowTokens

CPU_TOKENS = 2048
"""Tokens per micro-batch on a CPU. Larger micro-batches take more memory and are not faster; smaller ones are slower:
short rows of a small model took 1.8 times as long in micro-batches of 130 tokens."""


def default_budget(groups: Sequence[Sized], batch_size: int, tokens: RowTokens, device_type: str) -> int:
    """The default size for these groups, from the longest one."""
    return batch_budget(batch_size, longest_group(groups, tokens), device_type)


def longest_group(groups: Sequence[Sized], tokens: RowTokens) -> int:
    """Tokens of the largest group."""
    return max(int(tokens.of_each(some).max()) for some in lengths_of(groups).chunks())


def batch_budget(batch_size: int, longest: int, device_type: str) -> int:
    """On a GPU, the tokens of `batch_size` longest groups; on a CPU, `CPU_TOKENS`, or the longest group if larger."""
    return max(longest, CPU_TOKENS) if device_type == "cpu" else batch_size * longest
