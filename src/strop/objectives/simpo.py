"""Simple preference optimisation (arXiv 2405.14734): a margin of mean log-probs, without a reference.

With a(y) the mean of y's trained tokens' log-probs, ls = log sigmoid:

    loss = -ls(simpo_beta (a(chosen) - a(rejected) - simpo_gamma))

a sum over pairs, divided by the pairs of the step. The gamma of the paper is simpo_beta * simpo_gamma, so simpo_gamma
is its "gamma / beta ratio" (eq. 6 has -ls(beta a_c - beta a_r - gamma)).

    sft_weight    + sft_weight * (- the sum of lp(chosen)) / (chosen tokens of the step)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from strop.batch import Scores
from strop.config.methods import SimpoSettings
from strop.objectives.pairs import PairObjective, Sides, means


class Simpo(PairObjective[SimpoSettings]):
    """Pairs by their mean log-probs."""

    @property
    def beta(self) -> float:
        return self.settings.simpo_beta

    @property
    def sft_weight(self) -> float:
        return self.settings.sft_weight

    def sides(self, scores: Scores) -> Sides:
        return means(scores)

    def preference(self, scores: Scores) -> Tensor:
        return -F.logsigmoid(self.beta * (self.sides(scores).margin - self.settings.simpo_gamma))
