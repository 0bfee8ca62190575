"""Odds ratio preference optimisation (arXiv 2403.07691): likelihood and preference at once, without a reference.

With lp(y) the sum and a(y) the mean of y's trained tokens' log-probs, odds(y) = exp(a) / (1 - exp(a)):

    loss = - the sum of lp(chosen)                                     by the chosen tokens of the step
           - beta * log sigmoid(log(odds(chosen) / odds(rejected)))    by the pairs of the step

(eq. 6 and 7; beta is the paper's lambda). The likelihood is that of the chosen completion (orpo_nll completion), or of
prompt and chosen completion, by the tokens of both (full): the prompt is then trained too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.batch import PROMPT_LOGPS, Scores
from strop.columns import Unit, groups
from strop.config.methods import OrpoSettings
from strop.objectives.pairs import PairObjective, Sides, chosen_nll, chosen_row_tokens, chosen_tokens, means


class Orpo(PairObjective[OrpoSettings]):
    """The chosen likelihood, and pairs by their odds."""

    @property
    def beta(self) -> float:
        return self.settings.beta

    @property
    def trains_prompts(self) -> bool:
        return self.settings.orpo_nll == "full"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({PROMPT_LOGPS} if self.trains_prompts else ())

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"preference": groups, "nll": chosen_row_tokens if self.trains_prompts else chosen_tokens}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        nll = chosen_nll(scores)
        if self.trains_prompts:
            nll = nll - scores[PROMPT_LOGPS].double().sum()
        return {"preference": self.preference(scores).sum(), "nll": nll}

    def sides(self, scores: Scores) -> Sides:
        return means(scores)

    def preference(self, scores: Scores) -> Tensor:
        return self.beta * odds_ratio_loss(*self.sides(scores))


def odds_ratio_loss(a_c: Tensor, a_r: Tensor) -> Tensor:
    """[G] -log sigmoid(log(odds(chosen) / odds(rejected))), exact where a chosen completion has probability 1 too.

    There odds(rejected) / odds(chosen) is 0, and so is the loss; the logarithm of it has an infinite slope. Where a
    rejected completion has probability 1 the loss is infinite, and where both have, undefined.
    """
    likelier = log_odds(a_r, a_c) < 0
    # each form where it is exact; what the other one sees there must be harmless, since its gradient is multiplied by 0
    c, r = (torch.where(likelier, a, -1.0) for a in (a_c, a_r))
    ratio = torch.exp(r - c) * torch.expm1(c) / torch.expm1(r)
    c, r = (torch.where(likelier, -1.0, a) for a in (a_c, a_r))
    return torch.where(likelier, torch.log1p(ratio), -F.logsigmoid(log_odds(c, r)))


def log_odds(a: Tensor, other: Tensor) -> Tensor:
    """log(odds / other odds)."""
    return a - other - log1mexp(a) + log1mexp(other)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a <= 0, without cancellation at either end."""
    near_zero = a > -math.log(2)
    near, far = torch.where(near_zero, a, -1.0), torch.where(near_zero, -1.0, a)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
