"""Reward models on pairs: the logistic loss of Bradley and Terry (1952), as in InstructGPT (arXiv 2203.02155, eq. 1).

With r(y) the number that the model gives a completion after its prompt, ls = log sigmoid, and m the row's `margin`, by
how much the chosen completion is better (0 where rows have none; Llama 2, arXiv 2307.09288, eq. 2):

    loss = -ls(r(chosen) - r(rejected) - m)

a sum over pairs, divided by the pairs of the step. r(y) is the output of one linear layer, `score`, at the last token
of y, with the end token and all else that the chat template writes behind the answer. Padding tokens at the end are
left out: transformers does not read them either.

    center_rewards_coefficient    + coefficient * (r(chosen) + r(rejected))^2    (arXiv 2312.09244)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from strop.batch import Scores
from strop.columns import Unit, groups
from strop.config.methods import RewardSettings
from strop.objectives.base import Mean, Objective
from strop.objectives.pairs import Sides


class Reward(Objective[RewardSettings]):
    """A number for every completion, higher for the chosen one of a pair."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "rewards/chosen": "reward of the chosen completions; only differences of rewards mean something",
        "rewards/rejected": "the same of the rejected ones",
        "rewards/margins": "their difference; grows while preferences are learnt",
        "rewards/accuracies": "share of pairs whose chosen completion has the higher reward; ties count as wrong; if "
        "it is far higher in training than on held-out rows: overfitting",
    }

    @property
    def may_read(self) -> frozenset[str]:
        return frozenset({"margin"})

    @property
    def units(self) -> Mapping[str, Unit]:
        return dict.fromkeys(
            ("preference", "centre") if self.settings.center_rewards_coefficient else ("preference",), groups
        )

    def sides(self, scores: Scores) -> Sides:
        """The rewards of both completions of each pair, which stand in place of log-probs."""
        return Sides.of(scores.sums(scores.logps))

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        sides = self.sides(scores)
        better_by = scores["margin"].double() if "margin" in scores.columns.names else 0.0
        terms = {"preference": -F.logsigmoid(sides.margin - better_by).sum()}
        if coefficient := self.settings.center_rewards_coefficient:
            terms["centre"] = coefficient * ((sides.chosen + sides.rejected) ** 2).sum()
        return terms

    def margins(self, scores: Scores) -> Tensor:
        return self.sides(scores).margin

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        pairs, sides = scores.structure.num_groups, self.sides(scores)
        return {
            "rewards/chosen": (sides.chosen.sum(), pairs),
            "rewards/rejected": (sides.rejected.sum(), pairs),
            "rewards/margins": (sides.margin.sum(), pairs),
            "rewards/accuracies": ((sides.chosen > sides.rejected).sum(), pairs),
        }
