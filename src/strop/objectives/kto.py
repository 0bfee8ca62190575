"""Kahneman-Tversky optimisation (arXiv 2402.01306): completions with a label, desirable or not, without pairs.

With the log-ratio u = lp_pi(y) - lp_ref(y) of a completion to its prompt x, sg = sigmoid:

    z0 = max(0, the mean over the step of lp_pi(y'|x) - lp_ref(y'|x)),  y' a completion of another prompt

    desirable      desirable_weight   (1 - sg(beta (u - z0)))     eq. 8
    undesirable    undesirable_weight (1 - sg(beta (z0 - u)))

a sum over completions, divided by the completions of the step. z0 carries no gradient; its y' are drawn anew each epoch
and scored for it alone, so that it is the same for every cut of the step and stands at a batch of one row too. An
evaluation counts as one step.

    kto_loss apo_zero_unpaired    z0 = 0 (APO-zero, 2408.06266, eq. 7, without pairs): nothing is scored for it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.batch import Scores
from strop.columns import Unit, completions
from strop.config.methods import KtoSettings
from strop.objectives.base import MISMATCHED, Mean, Objective


class Kto(Objective[KtoSettings]):
    """Labelled completions against a reference."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "rewards/chosen": "beta times the log-ratio of desirable completions; should rise against the undesirable ones",
        "rewards/rejected": "the same of undesirable ones",
        "rewards/accuracies": "share of rows on the right side of z0 (desirable: above it); ties count as wrong",
        "logps/chosen": "log-prob of a desirable completion",
        "logps/rejected": "the same of undesirable ones",
        "logps_per_token/chosen": "log-prob per token of desirable completions",
        "logps_per_token/rejected": "the same of undesirable ones",
        "lengths/chosen": "trained tokens of a desirable completion",
        "lengths/rejected": "the same of undesirable ones",
        "kl": "z0 of the step; if it stays at 0, unrelated text becomes less likely: see kl_unclamped",
        "kl_unclamped": "the same before max(0, .); well below 0, everything becomes less likely: lower the rate",
    }

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"ref_logps", "labels"})

    @property
    def also(self) -> frozenset[str]:
        return frozenset({MISMATCHED} if self.settings.kto_loss == "kto" else ())

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"preference": completions}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        s = self.settings
        u, z0 = scores.log_ratios, self.z0(scores)
        # sg(-x) for 1 - sg(x): the same, without cancellation
        desirable = s.desirable_weight * F.sigmoid(-s.beta * (u - z0))
        undesirable = s.undesirable_weight * F.sigmoid(-s.beta * (z0 - u))
        return {"preference": torch.where(scores["labels"], desirable, undesirable).sum()}

    def z0(self, scores: Scores) -> Tensor | float:
        if not self.also:
            return 0.0
        return scores.also[MISMATCHED].log_ratios.mean().clamp(min=0)  # a NaN stays one

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        ratios, logps, lengths = scores.log_ratios, scores.sums(scores.logps), scores.lengths
        z0, desirable = self.z0(scores), scores["labels"]
        right = torch.where(desirable, ratios > z0, ratios < z0)
        metrics: dict[str, Mean] = {"rewards/accuracies": (right.sum(), len(right))}
        for name, side in (("chosen", desirable), ("rejected", ~desirable)):
            # masked sums, since how many there are on a side is known on the device alone
            reward, logp, tokens = (torch.where(side, x, 0.0).sum() for x in (ratios, logps, lengths))
            count = side.sum()
            metrics[f"rewards/{name}"] = (self.settings.beta * reward, count)
            metrics[f"logps/{name}"] = (logp, count)
            metrics[f"logps_per_token/{name}"] = (logp, tokens)
            metrics[f"lengths/{name}"] = (tokens, count)
        if self.also:
            others = scores.also[MISMATCHED].log_ratios
            metrics |= {"kl": (z0, 1), "kl_unclamped": (others.sum(), len(others))}
        return metrics
