"""Direct preference optimisation (arXiv 2305.18290) and its loss variants on pairs.

For a pair, with lp(y) the sum of y's trained tokens' log-probs, n(y) their count, ls = log sigmoid, sg = sigmoid:

    c = lp_pi(chosen) - lp_ref(chosen),  r = lp_pi(rejected) - lp_ref(rejected),  margin d = c - r,  b = beta

    sigmoid       -(1 - e) ls(b d) - e ls(-b d)           eq. 7; label_smoothing e > 0 is conservative DPO
    hinge         relu(1 - b d)                           SLiC 2305.10425, RSO 2309.06657
    ipo           (d' - 1 / (2 b))^2                      2310.12036, eq. 17; d' = d with ipo_norm sum (the paper),
                                                          d' = c / n(chosen) - r / n(rejected) with mean
    kto_pair      1 - sg(b (c - z_r)) + 1 - sg(b (z_c - r))
                                                          2402.01306, paired form; z_c, z_r: the means of c and r over
                                                          the step, at least 0, without gradient
    robust        (-(1 - e) ls(b d) + e ls(-b d)) / (1 - 2 e)
                                                          2403.00409
    exo_pair      sg(b d) (ls(b d) - log(1 - e)) + sg(-b d) (ls(-b d) - log e)
                                                          2402.00856, eq. 16; e > 0
    nca_pair      -ls(b c) - ls(-b c) / 2 - ls(-b r) / 2  2402.05369
    bco_pair      -ls(b c - m) - ls(-(b r - m))           2404.04656; m: the mean of the step's rewards b c and b r,
                                                          without gradient (bco_delta mean), or 0 (zero)
    sppo_hard     (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2   2405.00675, eq. 4.7 with P = 1 and 0
    aot           sigmoid of b (q_i - p_i)                2406.05882; q_i, p_i: i-th smallest lp(chosen) - lp(rejected)
                                                          of policy and reference in the step
    aot_unpaired  sigmoid of b (c_i - r_i)                the same; c_i, r_i: i-th smallest c and r of the step
    apo_zero      1 - sg(b c) + sg(b r)                   2408.06266, eq. 7: chosen up, rejected down
    apo_down      sg(b c) + 1 - sg(b d)                   2408.06266, eq. 8: both down, rejected more
    discopop      z = b d, m = sg(z / tau): -ls(z) (1 - m) + exp(-z) m
                                                          2406.08414, eq. 5; tau: discopop_tau
    sigmoid_norm  -ls(b (c / n(chosen) - r / n(rejected)))
                                                          length-normalised DPO, 2411.15124

Every variant is a sum over pairs, divided by the pairs of the step.

    f_divergence  f(c) and f(r) take the place of c and r (2309.16240): forward_kl 1 - exp(-u), js log 2 + ls(u),
                  alpha (exp((a - 1) u) - 1) / (a - 1), a: f_alpha
    ld_alpha      tokens of the longer completion beyond the length of the shorter one count ld_alpha times in lp
                  (2409.06411)
    wpo_weighting each pair's loss counts w(chosen) w(rejected) times, without gradient, w(y) = exp of the mean over y's
                  tokens of lp_pi - log(sum over the vocabulary of p_pi^2)   (2406.11827)
    ref_sync_steps, ref_mixup_alpha
                  every this many steps the reference becomes alpha * policy + (1 - alpha) * reference (2404.09656)
    sft_weight    + sft_weight * (- the sum of lp_pi(chosen)) / (chosen tokens of the step)   (RPO, 2404.19733)

Rewards, margins and log-probs are logged as they are, before these options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.batch import Scores
from strop.config.methods import DpoSettings, IpoSettings
from strop.objectives.base import RefSync
from strop.objectives.pairs import ReferenceObjective, Sides, smoothed

WHOLE_STEP = frozenset({"kto_pair", "aot", "aot_unpaired"})
"""Losses with a statistic of the whole step; bco_pair has one unless its delta is zero."""


class Dpo(ReferenceObjective[DpoSettings]):
    """Pairs against a reference."""

    @property
    def whole_step(self) -> bool:
        s = self.settings
        return s.loss_type in WHOLE_STEP or (s.loss_type == "bco_pair" and s.bco_delta == "mean")

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | ({"collisions"} if self.settings.wpo_weighting else set())

    @property
    def ref_sync(self) -> RefSync | None:
        s = self.settings
        return None if s.ref_sync_steps is None else RefSync(s.ref_sync_steps, s.ref_mixup_alpha)

    @property
    def sft_weight(self) -> float:
        return self.settings.sft_weight

    def preference(self, scores: Scores) -> Tensor:
        s = self.settings
        weights = desensitised(scores, s.ld_alpha) if s.ld_alpha != 1 else None
        pairs = Pairs.of(scores, weights).mapped(lambda u: divergence(u, s))
        losses = LOSSES[s.loss_type](pairs, s)
        return losses * on_policy_weights(scores) if s.wpo_weighting else losses


@dataclass(frozen=True)
class Pairs:
    """What a loss sees, [G] float64 each. c, r: as above. policy, reference: lp(chosen) - lp(rejected) under either.
    lengths: n(chosen), n(rejected)."""

    c: Tensor
    r: Tensor
    policy: Tensor
    reference: Tensor
    lengths: Sides

    @classmethod
    def of(cls, scores: Scores, weights: Tensor | None = None) -> Pairs:
        """weights: [M], how much each token counts; None: all the same."""
        w = 1.0 if weights is None else weights
        policy, reference = (Sides.of(scores.sums(w * x)) for x in (scores.logps, scores["ref_logps"]))
        c, r = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return cls(c, r, policy.margin, reference.margin, Sides.of(scores.lengths))

    def mapped(self, f: Callable[[Tensor], Tensor]) -> Pairs:
        """With f(c) and f(r) for c and r."""
        return Pairs(f(self.c), f(self.r), self.policy, self.reference, self.lengths)

    @property
    def d(self) -> Tensor:
        return self.c - self.r

    @property
    def d_per_token(self) -> Tensor:
        return self.c / self.lengths.chosen - self.r / self.lengths.rejected


def divergence(u: Tensor, s: DpoSettings) -> Tensor:
    """What takes the place of the log-ratio u: the slope of f at the ratio, shifted to 0 at a ratio of 1."""
    match s.f_divergence:
        case "reverse_kl":
            return u
        case "forward_kl":
            return -torch.expm1(-u)
        case "js":
            return math.log(2) + F.logsigmoid(u)
        case "alpha":
            a = s.f_alpha
            return u if a == 1 else torch.expm1((a - 1) * u) / (a - 1)


def desensitised(scores: Scores, alpha: float) -> Tensor:
    """[M] float64: 1 for tokens within the length of the pair's shorter completion, `alpha` for the ones after it."""
    lengths, of = scores.lengths, scores.completion_index
    shared = torch.minimum(*Sides.of(lengths)).repeat_interleave(2)
    place = torch.arange(len(of), device=of.device) - (lengths.cumsum(0) - lengths)[of]
    return torch.ones_like(place, dtype=torch.float64).masked_fill(place >= shared[of], alpha)


def on_policy_weights(scores: Scores) -> Tensor:
    """[G] float64: how likely the policy itself is to write both completions, by token, beside what it would draw."""
    likeness = scores.sums((scores.logps - scores["collisions"]).detach()) / scores.lengths
    chosen, rejected = Sides.of(likeness)
    return torch.exp(chosen + rejected)


# -- the losses, [G] float64 each ------------------------------------------------------------------------------------


def sigmoid(p: Pairs, s: DpoSettings) -> Tensor:
    return smoothed(s.beta * p.d, s.label_smoothing)


def hinge(p: Pairs, s: DpoSettings) -> Tensor:
    return F.relu(1 - s.beta * p.d)


def ipo(p: Pairs, s: DpoSettings | IpoSettings) -> Tensor:
    d = p.d_per_token if s.ipo_norm == "mean" else p.d
    return (d - 1 / (2 * s.beta)) ** 2


def kto_pair(p: Pairs, s: DpoSettings) -> Tensor:
    z_c, z_r = (u.detach().mean().clamp(min=0) for u in (p.c, p.r))
    # sg(-x) for 1 - sg(x): the same, without cancellation
    return F.sigmoid(-s.beta * (p.c - z_r)) + F.sigmoid(-s.beta * (z_c - p.r))


def robust(p: Pairs, s: DpoSettings) -> Tensor:
    e, logits = s.label_smoothing, s.beta * p.d
    return (-(1 - e) * F.logsigmoid(logits) + e * F.logsigmoid(-logits)) / (1 - 2 * e)


def exo_pair(p: Pairs, s: DpoSettings) -> Tensor:
    e, logits = s.label_smoothing, s.beta * p.d
    to_chosen = F.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-e))
    return to_chosen + F.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(e))


def nca_pair(p: Pairs, s: DpoSettings) -> Tensor:
    chosen, rejected = s.beta * p.c, s.beta * p.r
    return -F.logsigmoid(chosen) - F.logsigmoid(-chosen) / 2 - F.logsigmoid(-rejected) / 2


def bco_pair(p: Pairs, s: DpoSettings) -> Tensor:
    chosen, rejected = s.beta * p.c, s.beta * p.r
    delta = torch.cat([chosen, rejected]).detach().mean() if s.bco_delta == "mean" else 0.0
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def sppo_hard(p: Pairs, s: DpoSettings) -> Tensor:
    target = 1 / (2 * s.beta)
    return (p.c - target) ** 2 + (p.r + target) ** 2


def aot(p: Pairs, s: DpoSettings) -> Tensor:
    return smoothed(s.beta * (p.policy.sort().values - p.reference.sort().values), s.label_smoothing)


def aot_unpaired(p: Pairs, s: DpoSettings) -> Tensor:
    return smoothed(s.beta * (p.c.sort().values - p.r.sort().values), s.label_smoothing)


def apo_zero(p: Pairs, s: DpoSettings) -> Tensor:
    return F.sigmoid(-s.beta * p.c) + F.sigmoid(s.beta * p.r)


def apo_down(p: Pairs, s: DpoSettings) -> Tensor:
    return F.sigmoid(s.beta * p.c) + F.sigmoid(-s.beta * p.d)


def discopop(p: Pairs, s: DpoSettings) -> Tensor:
    logits = s.beta * p.d
    # exp(-z) m in one exponential: apart, they are infinity times 0 where z is far below 0
    exponential = torch.exp(F.logsigmoid(logits / s.discopop_tau) - logits)
    return -F.logsigmoid(logits) * F.sigmoid(-logits / s.discopop_tau) + exponential


def sigmoid_norm(p: Pairs, s: DpoSettings) -> Tensor:
    return -F.logsigmoid(s.beta * p.d_per_token)


LOSSES: Mapping[str, Callable[[Pairs, DpoSettings], Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        hinge,
        ipo,
        kto_pair,
        robust,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sigmoid_norm,
    )
}
