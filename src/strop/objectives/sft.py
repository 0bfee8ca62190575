"""Supervised fine-tuning: the negative log-likelihood of the completions.

tokens:     loss = - sum_t logp_t / (trained tokens of the step)
sequences:  loss = - sum_y a(y) / (sequences of the step),   a(y) = mean over y's trained tokens of logp_t
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from strop.batch import Scores
from strop.columns import Unit, completions, tokens
from strop.config.methods import SftSettings
from strop.objectives.base import Mean, Objective


class Sft(Objective[SftSettings]):
    """Token or sequence mean, exact over the whole step."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "nll": "negative log-likelihood per token; rising on held-out rows while it falls in training: overfitting",
        "lengths/completion": "trained tokens of a completion",
    }

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"nll": tokens if self.settings.loss_reduction == "tokens" else completions}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        logps = scores.sums(scores.logps)
        return {"nll": -(logps if self.settings.loss_reduction == "tokens" else logps / scores.lengths).sum()}

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        return {
            "nll": (-scores.logps.double().sum(), scores.structure.num_tokens),
            "lengths/completion": (scores.lengths.sum(), scores.structure.num_completions),
        }
