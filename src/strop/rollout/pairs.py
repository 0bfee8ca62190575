"""Completions with rewards to pairs. Floor 4."""

from __future__ import annotations

from collections.abc import Sequence


def best_and_worst(rewards: Sequence[float]) -> tuple[int, ...]:
    """Places of the completion with the highest reward and of the one with the lowest, the first where several have
    it; none, if all rewards are the same."""
    if len(set(rewards)) < 2:
        return ()
    return rewards.index(max(rewards)), rewards.index(min(rewards))
