"""How the completions of a group compare with each other, in the numbers of a step. Floor 4."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

from strop.objectives.base import FetchedMean


def compared(rewards: Sequence[Sequence[float]]) -> dict[str, FetchedMean]:
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


def by_length(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> dict[str, FetchedMean]:
    """How reward and length of completions go together, as (sum, count): Pearson's correlation within each group in
    which both differ; the lengths of completions whose reward is above the mean of their group, and below it.

    Args:
        rewards, lengths: of the completions of each prompt.
    """
    within: list[float] = []
    better: list[int] = []
    worse: list[int] = []
    for own, tokens in zip(rewards, lengths, strict=True):
        if len(set(own)) == 1:  # the mean of equal numbers need not be that number to the last bit
            continue
        mean = fmean(own)
        better += [n for reward, n in zip(own, tokens, strict=True) if reward > mean]
        worse += [n for reward, n in zip(own, tokens, strict=True) if reward < mean]
        within += _correlation(own, tokens)
    return {
        "rewards/length_correlation": (sum(within), len(within)),
        "completions/mean_length_better": (float(sum(better)), len(better)),
        "completions/mean_length_worse": (float(sum(worse)), len(worse)),
    }


def _correlation(rewards: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Pearson's correlation; nothing where one of the two is the same throughout."""
    r, n = np.array(rewards), np.array(lengths, float)
    r = r / np.abs(r).max()  # so that no square of a reward is too large or too small for a float
    r, n = r - r.mean(), n - n.mean()
    scale = float(np.sqrt((r @ r) * (n @ n)))
    return [float(r @ n) / scale] if scale > 0 else []
