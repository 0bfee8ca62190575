"""Direct preference optimisation (arXiv 2305.18290) and its loss variants on the same margin.

For a pair, with lp(y) the sum of y's trained tokens' log-probs, n(y) their count:

    c = lp_pi(chosen) - lp_ref(chosen),  r = lp_pi(rejected) - lp_ref(rejected),  margin d = c - r

    sigmoid    -(1 - e) ls(beta d) - e ls(-beta d)         eq. 7; label_smoothing e > 0 is conservative DPO
    hinge      relu(1 - beta d)                            SLiC 2305.10425, RSO 2309.06657
    ipo        (d' - 1 / (2 beta))^2                       2310.12036, eq. 17; d' = d with ipo_norm sum (the paper),
                                                           d' = c / n(chosen) - r / n(rejected) with mean (TRL)
    kto_pair   1 - sg(beta (c - z_r)) + 1 - sg(beta (z_c - r))
                                                           KTO 2402.01306 in its paired form: z_c and z_r are the means
                                                           of c and r over the step, at least 0, without gradient

Every variant is a sum over pairs, divided by the pairs of the step. kto_pair deviates from TRL, which takes z over the
micro-batch and averages the two halves (half this loss).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from strop.batch import Scores, Unit
from strop.config.methods import DpoSettings
from strop.objectives.base import Mean, Objective
from strop.types import RowShape


class Dpo(Objective[DpoSettings]):
    """Pairs against a reference."""

    rows: ClassVar[RowShape] = "pair"
    needs_reference: ClassVar[bool] = True

    @property
    def whole_step(self) -> bool:
        return self.settings.loss_type == "kto_pair"

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"preference": "groups"}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        s = self.settings
        c, r = log_ratios(scores)
        logits = s.beta * (c - r)
        match s.loss_type:
            case "sigmoid":
                e = s.label_smoothing
                loss = -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)
            case "hinge":
                loss = F.relu(1 - logits)
            case "ipo":
                if s.ipo_norm == "mean":
                    n_c, n_r = scores.lengths[0::2], scores.lengths[1::2]
                    c, r = c / n_c, r / n_r
                loss = (c - r - 1 / (2 * s.beta)) ** 2
            case "kto_pair":
                z_c, z_r = c.detach().mean().clamp(min=0), r.detach().mean().clamp(min=0)
                # sg(-x) for 1 - sg(x): the same, without cancellation
                loss = F.sigmoid(-s.beta * (c - z_r)) + F.sigmoid(-s.beta * (z_c - r))
        return {"preference": loss.sum()}

    def margins(self, scores: Scores) -> Tensor:
        c, r = log_ratios(scores)
        return (c - r).detach()

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        beta, pairs = self.settings.beta, scores.num_groups
        c, r = (x.detach() for x in log_ratios(scores))
        return {
            "rewards/chosen": (beta * c.sum(), pairs),
            "rewards/rejected": (beta * r.sum(), pairs),
            "rewards/margins": (beta * (c - r).sum(), pairs),
            # a tie is not correct: at the first step policy = reference and the accuracy is 0
            "rewards/accuracies": ((c > r).sum(), pairs),
            **pair_metrics(scores),
        }


def log_ratios(scores: Scores) -> tuple[Tensor, Tensor]:
    """[G], [G] float64: the log-ratio policy to reference of the chosen and of the rejected completions."""
    assert scores.ref_logps is not None
    # summed apart, subtracted in float64: the two are close, their sums are large
    ratios = scores.sums(scores.logps) - scores.sums(scores.ref_logps)
    return ratios[0::2], ratios[1::2]


def pair_metrics(scores: Scores) -> Mapping[str, Mean]:
    """A side: log-probs per completion (`logps/*`) and per token (`logps_per_token/*`), tokens (`lengths/*`)."""
    pairs = scores.num_groups
    logps, lengths = scores.sums(scores.logps.detach()), scores.lengths
    metrics: dict[str, Mean] = {}
    for side, name in enumerate(("chosen", "rejected")):
        total, tokens = logps[side::2].sum(), lengths[side::2].sum()
        metrics[f"logps/{name}"] = (total, pairs)
        metrics[f"logps_per_token/{name}"] = (total, int(tokens))
        metrics[f"lengths/{name}"] = (tokens, pairs)
    return metrics
