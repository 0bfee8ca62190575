"""The losses on groups of sampled completions in plain numpy and float64, one completion at a time, from their papers.

A step is a list of groups, a group a list of completions, a completion a dict: `pi`, `old`, `ref`, `sampler` (log-probs
per token), `r` (its reward), `each` and `weights` (its rewards one by one, what each counts), `ended` (false: it was
cut off) and `p` ([tokens, vocabulary], the policy's distribution of each token). `still` is the step at which what
carries no gradient is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Completion = Mapping[str, Any]
Step = Sequence[Sequence[Completion]]


def advantages(s: Any, step: Step) -> list[list[Any]]:
    """[group][completion] an array with the advantage of every token."""
    kl_in_reward = bool(s.beta) and s.kl_in == "reward"

    def reward(y: Completion) -> float:
        return float(y["r"]) - (s.beta * float(np.sum(y["old"] - y["ref"])) if kl_in_reward else 0.0)

    everything = np.array([reward(y) for group in step for y in group])
    out: list[list[Any]] = []
    for group in step:
        r = np.array([reward(y) for y in group])
        n = len(r)
        lengths = np.array([len(y["pi"]) for y in group])
        match s.advantage:
            case "group":
                a = (r - r.mean()) / (np.std(r, ddof=1) + 1e-4)
            case "mean" | "reinforce++_baseline":
                a = r - r.mean()
            case "batch":
                a = (r - r.mean()) / (np.std(everything, ddof=1) + 1e-4)
            case "rloo":
                a = np.array([r[i] - np.delete(r, i).mean() for i in range(n)])
            case "maxrl":
                a = (r - r.mean()) / r.mean() if r.mean() > 0 else 0 * r
            case "opo":
                a = r - (lengths * r).sum() / lengths.sum()
            case "gdpo":
                a = normalised(group)
            case _:
                a = r
        out.append([np.full(length, x) for x, length in zip(a, lengths, strict=True)])
    if s.advantage == "reinforce++" and kl_in_reward:  # eq. of A_t: the reward minus the divergence still to come
        out = [
            [np.array([y["r"] - s.beta * (y["old"] - y["ref"])[t:].sum() for t in range(len(y["pi"]))]) for y in group]
            for group in step
        ]
    if s.advantage == "gdpo":  # eq. of the batch-wise normalisation, over completions
        own = np.concatenate([normalised(group) for group in step])
        out = [[(a - own.mean()) / (np.std(own, ddof=1) + 1e-4) for a in group] for group in out]
    if s.advantage.startswith("reinforce++"):
        flat = np.concatenate([a for group in out for a in group])
        out = [[(a - flat.mean()) / max(flat.std(), 1e-4) for a in group] for group in out]
    return out


def normalised(group: Sequence[Completion]) -> Any:
    """[completions] each of the rewards `each` normalised over the group, times its weight `weights`, added up."""
    total = np.zeros(len(group))
    for k, weight in enumerate(group[0]["weights"]):
        r = np.array([y["each"][k] for y in group])
        total += weight * (r - r.mean()) / (np.std(r, ddof=1) + 1e-4)
    return total


def token_losses(s: Any, y: Completion, still: Completion, a: Any) -> Any:
    """The loss of every token of a completion, weighted by the correction."""
    log_ratio = y["pi"] - y["old"]
    n = len(log_ratio)
    if s.gate == "gmpo":
        sign = np.sign(a[0])
        bound = s.epsilon_high if sign > 0 else s.epsilon
        product = np.exp(np.sum(sign * np.minimum(sign * log_ratio, bound)) / n) if sign else 1.0
        loss = np.full(n, -product * a[0])
    else:
        w = ratio(s, log_ratio)
        fixed = ratio(s, still["pi"] - y["old"])
        loss = np.array([gate(s, w[t], fixed[t], a[t], y["pi"][t]) for t in range(n)])
    return loss * correction(s, y)


def ratio(s: Any, log_ratio: Any) -> Any:
    n = len(log_ratio)
    if s.importance_sampling_level == "sequence":
        return np.full(n, np.prod(np.exp(log_ratio)) ** (1 / n))
    if s.importance_sampling_level == "sequence_product":
        return np.full(n, np.prod(np.exp(log_ratio)))
    return np.exp(log_ratio)


def gate(s: Any, w: float, fixed: float, a: float, logp: float) -> float:
    if s.gate == "none":
        return -w * a
    if s.gate == "sapo":
        k = s.sapo_temperature_pos if a > 0 else s.sapo_temperature_neg
        return -(4 / k) / (1 + np.exp(-k * (w - 1))) * a
    low, high = 1 - s.epsilon, 1 + s.epsilon_high
    if s.gate == "cispo":
        return -min(max(fixed, low), high) * a * logp
    first = w if s.delta is None else min(w, s.delta)
    return -min(first * a, min(max(w, low), high) * a)


def correction(s: Any, y: Completion) -> Any:
    v = np.exp(y["old"] - y["sampler"])
    n, low, high = len(v), s.sampler_correction_min, s.sampler_correction_max
    whole, mean = np.prod(v), np.prod(v) ** (1 / n)
    match s.sampler_correction:
        case "token_truncate":
            return np.minimum(v, high)
        case "token_mask":
            return np.array([x if low <= x <= high else 0.0 for x in v])
        case "sequence_truncate":
            return np.full(n, min(whole, high))
        case "sequence_mask":
            return np.full(n, whole if low <= whole <= high else 0.0)
        case "geometric_mask":
            return v if low <= mean <= high else 0 * v
    return np.ones(n)


def divergence(s: Any, y: Completion, still: Completion) -> Any:
    """The estimate of every token, as a function whose gradient is the term's."""
    d = y["ref"] - y["pi"]
    k3 = np.exp(d) - d - 1
    fixed = still["ref"] - still["pi"]
    value = {
        "k1": -d,
        "k2": d**2 / 2,
        "k3": k3,
        "k3+": np.exp(fixed) - fixed - 1 + d**2 / 2 - fixed**2 / 2,
    }[s.kl_estimator]
    if not s.use_bias_correction_kl:
        return value
    at = y if s.kl_estimator in ("k1", "k3") else still
    return value * ratio(s, at["pi"] - y["old"])


def aggregated(s: Any, losses: list[list[Any]], step: Step) -> float:
    num_rows = sum(len(group) for group in losses)
    if s.mask_truncated_completions:
        pairs = [list(zip(group, own, strict=True)) for group, own in zip(losses, step, strict=True)]
        losses = [[row for row, y in group if y["ended"]] for group in pairs]
        losses = [group for group in losses if group]
    rows = [row for group in losses for row in group]
    if not rows:
        return 0.0
    match s.aggregation:
        case "sequence":
            return float(np.mean([row.mean() for row in rows]))
        case "token":
            return float(np.concatenate(rows).mean())
        case "constant":
            return float(sum(row.sum() for row in rows) / (num_rows * s.normalizer_length))
        case "sequence_sum":
            return float(np.mean([row.sum() for row in rows]))
    return float(np.mean([np.concatenate(group).mean() for group in losses]))


def step_loss(s: Any, step: Step, still: Step) -> float:
    """The loss of a whole step under the settings `s`."""
    a = advantages(s, still)

    def over_tokens(loss: Callable[..., Any]) -> float:
        found = [
            [loss(y, z, own) for y, z, own in zip(group, fixed, of_group, strict=True)]
            for group, fixed, of_group in zip(step, still, a, strict=True)
        ]
        return aggregated(s, found, step)

    total = over_tokens(lambda y, z, own: token_losses(s, y, z, own))
    if s.beta and s.kl_in == "loss":
        total += s.beta * over_tokens(lambda y, z, _: divergence(s, y, z))
    if s.entropy_coef:
        told = [y["p"] for group in step for y in group if not s.mask_truncated_completions or y["ended"]]
        total -= s.entropy_coef * float(np.mean([entropy(p) for of_tokens in told for p in of_tokens] or [0.0]))
    return total


def entropy(p: Any) -> float:
    """Of a distribution, in nats."""
    return -sum(float(x) * math.log(x) for x in p if x > 0)
