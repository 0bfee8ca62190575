"""Identity preference optimisation (arXiv 2310.12036): a margin of a given size, and no larger.

With the log-ratios c and r of dpo, n(y) the trained tokens of y:

    loss = (d - 1 / (2 beta))^2,   d = c - r                            ipo_norm sum: eq. 17 of the paper
                                   d = c / n(chosen) - r / n(rejected)  ipo_norm mean

a sum over pairs, divided by the pairs of the step. It is dpo's loss_type ipo under its own name.
"""

from __future__ import annotations

from torch import Tensor

from strop.batch import Scores
from strop.config.methods import IpoSettings
from strop.objectives.dpo import Pairs, ipo
from strop.objectives.pairs import ReferenceObjective


class Ipo(ReferenceObjective[IpoSettings]):
    """Pairs against a reference, regressed."""

    def preference(self, scores: Scores) -> Tensor:
        return ipo(Pairs.of(scores), self.settings)
