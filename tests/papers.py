"""Every loss in plain numpy and float64, one pair at a time, written from the papers: the oracle of the objectives.

A step is a list of groups, a group a list of completions, a completion two arrays of log-probs: policy, reference.
Labelled groups are desirable and undesirable by turns, the first one is desirable; `others` are the completions of z0.
Statistics of the step that carry no gradient are taken from `at`, so that finite differences can hold them still.
prompts: the log-probs of each group's prompt. collisions: log(sum of p^2) at each token, shaped as the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Step = Sequence[Sequence[tuple[Array, Array]]]


def sigma(x: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -x)))


def log_sigma(x: float) -> float:
    return -float(np.logaddexp(0.0, -x))


def step_loss(
    s: Any,
    step: Step,
    at: Step | None = None,
    others: Step = (),
    prompts: Sequence[Array] = (),
    collisions: Sequence[Sequence[Array]] = (),
) -> float:
    """The loss of a whole step under the settings `s`."""
    at = step if at is None else at
    if s.method == "kto":
        return kto(s, step, others)
    if s.method == "sft":
        rows = [group[0][0] for group in step]
        if s.loss_reduction == "tokens":
            return -sum(float(x) for row in rows for x in row) / sum(len(row) for row in rows)
        return -sum(float(np.mean(row)) for row in rows) / len(rows)
    chosen_nll = -sum(float(g[0][0].sum()) for g in step) / sum(len(g[0][0]) for g in step)
    if s.method == "orpo":
        pairs = [-log_sigma(np.log(odds(g[0][0]) / odds(g[1][0]))) for g in step]
        if s.orpo_nll == "full":
            rows = [np.concatenate([x, g[0][0]]) for x, g in zip(prompts, step, strict=True)]
            chosen_nll = -float(np.concatenate(rows).mean())
        return chosen_nll + s.beta * float(np.mean(pairs))
    if s.method == "simpo":
        # eq. 6 with gamma = simpo_beta * simpo_gamma
        b, gamma = s.simpo_beta, s.simpo_beta * s.simpo_gamma
        pairs = [-log_sigma(b * g[0][0].mean() - b * g[1][0].mean() - gamma) for g in step]
        return float(np.mean(pairs)) + s.sft_weight * chosen_nll
    if s.method == "cpo":
        return float(np.mean([cdpo(s.beta * (g[0][0].sum() - g[1][0].sum()), s.label_smoothing) for g in step])) + (
            s.cpo_alpha * chosen_nll
        )
    if s.method == "ipo":
        return float(np.mean([regression(s, group) for group in step]))
    losses = np.array(dpo_losses(s, step, at))
    if s.wpo_weighting:
        losses *= [wpo_weight(group, drawn) for group, drawn in zip(at, collisions, strict=True)]
    return float(losses.mean()) + s.sft_weight * chosen_nll


def wpo_weight(group: Sequence[tuple[Array, Array]], collisions: Sequence[Array]) -> float:
    """The product over the pair of the geometric mean of p(token) / sum of p^2."""
    return float(np.prod([np.prod(np.exp(p - x)) ** (1 / len(p)) for (p, _), x in zip(group, collisions, strict=True)]))


def kto(s: Any, step: Step, others: Step) -> float:
    z0 = 0.0
    if s.kto_loss == "kto":
        z0 = max(0.0, float(np.mean([float(p.sum() - q.sum()) for ((p, q),) in others])))
    losses = []
    for i, ((p, q),) in enumerate(step):
        u = float(p.sum() - q.sum())
        if i % 2 == 0:
            losses.append(s.desirable_weight * (1 - sigma(s.beta * (u - z0))))
        else:
            losses.append(s.undesirable_weight * (1 - sigma(s.beta * (z0 - u))))
    return float(np.mean(losses))


def odds(logps: Array) -> float:
    p = float(np.exp(logps.mean()))
    return p / (1 - p)


def cdpo(z: float, e: float) -> float:
    return (1 - e) * -log_sigma(z) + e * -log_sigma(-z)


def regression(s: Any, group: Sequence[tuple[Array, Array]]) -> float:
    per = [np.sum(policy) - np.sum(ref) for policy, ref in group]
    if s.ipo_norm == "mean":
        per = [np.mean(policy) - np.mean(ref) for policy, ref in group]
    return float((per[0] - per[1] - 1 / (2 * s.beta)) ** 2)


def total(logps: Array, other: Array, alpha: float) -> float:
    """LD-DPO: the tokens up to the shorter completion's end, and alpha times the rest."""
    shared = min(len(logps), len(other))
    return float(logps[:shared].sum() + alpha * logps[shared:].sum())


def f_prime(t_log: float, s: Any) -> float:
    """f'(t) of f-DPO at log t."""
    t, a = np.exp(t_log), s.f_alpha
    match s.f_divergence:
        case "forward_kl":
            return float(1 - 1 / t)
        case "js":
            return float(np.log(2 * t / (1 + t)))
        case "alpha" if a < 1:
            return float((t ** (a - 1) - 1) / (a - 1))
    return t_log


def ratios(s: Any, step: Step) -> tuple[Array, Array, Array, Array]:
    """c, r, and the policy's and the reference's lp(chosen) - lp(rejected), one number per pair each."""
    rows = []
    for (pc, qc), (pr, qr) in step:
        lp_c, lp_r = total(pc, pr, s.ld_alpha), total(pr, pc, s.ld_alpha)
        ref_c, ref_r = total(qc, qr, s.ld_alpha), total(qr, qc, s.ld_alpha)
        rows.append((f_prime(lp_c - ref_c, s), f_prime(lp_r - ref_r, s), lp_c - lp_r, ref_c - ref_r))
    c, r, policy, reference = np.array(rows).T
    return c, r, policy, reference


def dpo_losses(s: Any, step: Step, at: Step) -> list[float]:
    c, r, policy, reference = ratios(s, step)
    still_c, still_r, *_ = ratios(s, at)
    b, e, h = s.beta, s.label_smoothing, 1 / (2 * s.beta)
    kl_c, kl_r = max(0.0, float(still_c.mean())), max(0.0, float(still_r.mean()))
    shift = 0.0 if s.bco_delta == "zero" else float(b * (still_c.mean() + still_r.mean()) / 2)
    lengths = [(len(g[0][0]), len(g[1][0])) for g in step]
    if s.loss_type == "aot":
        return [cdpo(b * (q - p), e) for q, p in zip(sorted(policy), sorted(reference), strict=True)]
    if s.loss_type == "aot_unpaired":
        return [cdpo(b * (x - y), e) for x, y in zip(sorted(c), sorted(r), strict=True)]
    losses = []
    for x, y, (n_c, n_r) in zip(c, r, lengths, strict=True):
        z = b * (x - y)
        p = sigma(z)
        match s.loss_type:
            case "sigmoid":
                loss = cdpo(z, e)
            case "hinge":
                loss = max(0.0, 1 - z)
            case "ipo":
                loss = ((x / n_c - y / n_r if s.ipo_norm == "mean" else x - y) - h) ** 2
            case "kto_pair":
                loss = (1 - sigma(b * (x - kl_r))) + (1 - sigma(b * (kl_c - y)))
            case "robust":
                loss = ((1 - e) * -log_sigma(z) - e * -log_sigma(-z)) / (1 - 2 * e)
            case "exo_pair":
                # the KL divergence of (p, 1 - p) from (1 - e, e)
                loss = p * (log_sigma(z) - np.log(1 - e)) + sigma(-z) * (log_sigma(-z) - np.log(e))
            case "nca_pair":
                loss = -(log_sigma(b * x) + 0.5 * (log_sigma(-b * x) + log_sigma(-b * y)))
            case "bco_pair":
                loss = -log_sigma(b * x - shift) - log_sigma(-(b * y - shift))
            case "sppo_hard":
                loss = (x - h) ** 2 + (y + h) ** 2
            case "apo_zero":
                loss = 1 - sigma(b * x) + sigma(b * y)
            case "apo_down":
                loss = sigma(b * x) + 1 - sigma(z)
            case "discopop":
                m = sigma(z / s.discopop_tau)
                loss = -log_sigma(z) * (1 - m) + np.exp(-z + log_sigma(z / s.discopop_tau))
            case "sigmoid_norm":
                loss = -log_sigma(b * (x / n_c - y / n_r))
        losses.append(float(loss))
    return losses
