"""Completions with rewards to pairs, and what is measured of the groups that they come from. Floor 4."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

from strop.engine.step_records import Sum


def best_and_worst(rewards: Sequence[float]) -> tuple[int, ...]:
    """Places of the completion with the highest reward and of the one with the lowest, the first where several have
    it; none, if all rewards are the same."""
    if len(set(rewards)) < 2:
        return ()
    return rewards.index(max(rewards)), rewards.index(min(rewards))


def compared(rewards: Sequence[Sequence[float]]) -> dict[str, Sum]:
    """How the rewards of each prompt's completions lie to each other, as (sum, count) over prompts.

    Args:
        rewards: of the completions of each prompt.
    """
    gaps = [gap for own in rewards if (gap := max(own) - min(own))]
    return {
        "reward": (sum(sum(own) for own in rewards), sum(map(len, rewards))),
        "reward_std": (sum(stdev(own) for own in rewards), len(rewards)),
        "frac_reward_zero_std": (float(len(rewards) - len(gaps)), len(rewards)),
        "rollout/reward_gap": (sum(gaps), len(gaps)),
    }
