"""Contrastive preference optimisation (arXiv 2401.08417): DPO with a uniform reference, and the chosen likelihood.

With lp(y) the sum of y's trained tokens' log-probs, d = lp(chosen) - lp(rejected), ls = log sigmoid,
e = label_smoothing:

    loss = -(1 - e) ls(beta d) - e ls(-beta d)                         by the pairs of the step
           + cpo_alpha * (- the sum of lp(chosen))                     by the chosen tokens of the step

(eq. 3 and 5 of the paper, which takes the likelihood of a whole completion; per token, as here, long completions do
not outweigh the preference).
"""

from __future__ import annotations

from torch import Tensor

from strop.batch import Scores
from strop.config.methods import CpoSettings
from strop.objectives.pairs import PairObjective, Sides, smoothed


class Cpo(PairObjective[CpoSettings]):
    """Pairs by their log-probs."""

    @property
    def beta(self) -> float:
        return self.settings.beta

    @property
    def sft_weight(self) -> float:
        return self.settings.cpo_alpha

    def sides(self, scores: Scores) -> Sides:
        return Sides.of(scores.sums(scores.logps))

    def preference(self, scores: Scores) -> Tensor:
        return smoothed(self.beta * self.sides(scores).margin, self.settings.label_smoothing)
