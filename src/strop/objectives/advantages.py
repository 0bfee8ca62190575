"""Rewards to advantages, over the groups of a whole step. Floor 2.

Shapes: C completions, M scored tokens. With r the reward of a completion, means and standard deviations s (unbiased, as
TRL has them) over its group where nothing else is said:

    group                    (r - mean) / (s + 1e-4)                          GRPO, arXiv 2402.03300
    mean                     r - mean                                         Dr. GRPO, 2503.20783
    batch                    (r - mean) / (s of all rewards of the step + 1e-4)              2508.08221
    rloo                     r - the mean of the others of the group          2402.14740
    maxrl                    (r - mean) / mean; 0 where mean is 0             2602.02710
    opo                      r - (sum of length x r) / (sum of lengths)       2505.23585
    reinforce++              r, whitened over the tokens of the step          2501.03262
    reinforce++_baseline     r - mean, whitened over the tokens of the step   2501.03262
    gdpo                     (n - mean of all of the step) / (s of all + 1e-4), with n the sum over the rewards of
                             weight x (r - mean) / (s + 1e-4), each over its group               2601.05242
    none                     r

Whitening takes the mean of all tokens of the step away and divides by their standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strop.columns import Structure
from strop.errors import DataError

EPSILON = 1e-4


def advantages(kind: str, rewards: Tensor, structure: Structure, costs: Tensor | None = None) -> Tensor:
    """[M] float64.

    Args:
        rewards: [C]; under gdpo n, the sum of the normalised rewards.
        costs: [M] what is taken off the reward at each token (the divergence from a reference, times its weight): off
            that of the completion; under reinforce++ off what is still to come.

    Raises:
        DataError: a negative reward under maxrl.
    """
    rewards, of_token = rewards.double(), structure.completion_index()
    if kind == "reinforce++":
        per_token = rewards[of_token]
        return _whitened(per_token if costs is None else per_token - _to_come(costs, structure))
    if costs is not None:
        rewards = rewards - torch.zeros_like(rewards).index_add(0, of_token, costs.double())
    own = _of_completions(kind, rewards, structure)[of_token]
    return _whitened(own) if kind == "reinforce++_baseline" else own


def differ(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group tell its completions apart; where they do not, the group teaches nothing."""
    return len(set(rewards)) > 1


def group_sizes(group_index: Tensor, num_groups: int) -> Tensor:
    """[C] float64: how many completions the group of each completion has."""
    return _group_sums(torch.ones_like(group_index, dtype=torch.float64), group_index, num_groups)


def group_stds(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """The unbiased standard deviation of each completion's group; 0 in a group of one.

    Exactly 0 where all values of a group are the same. Nothing here waits for the device.

    Args:
        values: [C] float64. group_index: [C] the group of each completion, ascending, on the same device.

    Returns:
        [C].
    """
    sizes = group_sizes(group_index, num_groups)
    apart = _from_mean(values, group_index, num_groups)
    return (_group_sums(apart**2, group_index, num_groups) / (sizes - 1).clamp(min=1)).sqrt()


def _from_mean(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """[C] -> [C] how far each is from the mean of its group: exactly 0 where all values of a group are the same, since
    an optimiser may make a whole step of what rounding leaves."""
    centred = _from_first(values, group_index)
    return centred - _group_sums(centred, group_index, num_groups) / group_sizes(group_index, num_groups)


def _from_mean_of_all(values: Tensor) -> Tensor:
    """The same for one group of all values."""
    centred = values - values[:1]
    return centred - centred.mean()


def _from_first(values: Tensor, group_index: Tensor) -> Tensor:
    """[C] -> [C] how far each is from the first of its group: the mean of equal values need not be that value to the
    last bit."""
    return values - values[torch.searchsorted(group_index, group_index)]


def _of_completions(kind: str, r: Tensor, structure: Structure) -> Tensor:
    groups = (structure.group_index(), structure.num_groups)
    sizes = group_sizes(*groups)
    apart = _from_mean(r, *groups)
    match kind:
        case "group":
            return apart / (group_stds(r, *groups) + EPSILON)
        case "batch":
            return apart / ((r.std() if len(r) > 1 else r.new_zeros(())) + EPSILON)
        case "rloo":
            return apart * sizes / (sizes - 1)
        case "maxrl":
            if bool((r < 0).any()):
                raise DataError(
                    f"a reward is {float(r.min()):g}, and advantage maxrl divides by the mean of a group",
                    where="post_training.advantage: maxrl",
                    expected="rewards of at least 0",
                    fix="shift the rewards, or choose another advantage",
                )
            mean = _group_sums(r, *groups) / sizes
            return torch.where(mean > 0, apart / mean, 0.0)
        case "opo":
            lengths = torch.tensor(structure.tokens_per_completion, dtype=r.dtype)
            centred = _from_first(r, groups[0])
            return centred - _group_sums(lengths * centred, *groups) / _group_sums(lengths, *groups)
        case "gdpo":
            return _from_mean_of_all(r) / ((r.std() if len(r) > 1 else r.new_zeros(())) + EPSILON)
        case "mean" | "reinforce++_baseline":
            return apart
    return r


def normalised_sum(each: Sequence[Sequence[float]], weights: Sequence[float]) -> tuple[float, ...]:
    """The weighted sum of the rewards of one group, each minus its mean and divided by its standard deviation + 1e-4
    (GDPO, arXiv 2601.05242). Exactly 0 of a reward that is the same for all.

    Args:
        each: [rewards][completions of the group]. weights: [rewards].
    """
    r = torch.tensor(each, dtype=torch.float64)
    centred = r - r[:, :1]  # equal values are 0 from here on, to the last bit
    apart = centred - centred.mean(1, keepdim=True)
    std = (apart**2).sum(1, keepdim=True).div(max(r.shape[1] - 1, 1)).sqrt()
    found = torch.tensor(weights, dtype=torch.float64) @ (apart / (std + EPSILON))
    return tuple(found.tolist())


def _group_sums(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """[C] -> [C] the sum over each one's group."""
    return values.new_zeros(num_groups).index_add(0, group_index, values)[group_index]


def _to_come(costs: Tensor, structure: Structure) -> Tensor:
    """[M] -> [M] the sum from each token to the end of its completion."""
    parts = torch.split(costs.double(), list(structure.tokens_per_completion))
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in parts])


def _whitened(values: Tensor) -> Tensor:
    apart = _from_mean_of_all(values)
    return apart / (apart**2).mean().clamp(min=1e-8).sqrt()
