"""What objectives on pairs share: the two sides of a pair, their metrics, the likelihood of the chosen side. Floor 2.

Shapes: M scored tokens, C = 2 G completions (chosen, rejected, chosen, ...), G pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor

from strop.batch import Scores
from strop.columns import Structure, Unit, groups
from strop.config.methods import MethodSettings, ReferenceSettings
from strop.objectives.base import Mean, Objective

S = TypeVar("S", bound=MethodSettings)
R = TypeVar("R", bound=ReferenceSettings)


class Sides(NamedTuple):
    """One number per completion, [G] float64 each: of the chosen ones and of the rejected ones."""

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, per_completion: Tensor) -> Sides:
        """[C] -> [G], [G]."""
        return cls(per_completion[0::2], per_completion[1::2])

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


class PairObjective(Objective[S]):
    """A preference between two completions. It compares `sides`; `beta` times a side is its implicit reward."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "rewards/chosen": "implicit reward of the chosen completions; its sign means little; look closer if it falls",
        "rewards/rejected": "the same of the rejected ones",
        "rewards/margins": "their difference, beta times the margin; grows while preferences are learnt",
        "rewards/accuracies": "share of pairs whose chosen side has the higher reward; ties count as wrong",
        "logps/chosen": "log-prob of a chosen completion; if it falls while the margin grows: likelihood displacement",
        "logps/rejected": "the same of the rejected ones",
        "logps_per_token/chosen": "log-prob per token of the chosen side, to compare data of different lengths",
        "logps_per_token/rejected": "the same of the rejected ones",
        "lengths/chosen": "trained tokens of a chosen completion",
        "lengths/rejected": "the same of the rejected ones",
    }

    @property
    @abstractmethod
    def beta(self) -> float:
        """The factor between a side and its implicit reward."""

    @abstractmethod
    def sides(self, scores: Scores) -> Sides:
        """The number of each completion by which the two are compared, such as a log-ratio."""

    @property
    def sft_weight(self) -> float:
        """Weight of the negative log-likelihood of the chosen completions in the loss; 0: no such term."""
        return 0.0

    @abstractmethod
    def preference(self, scores: Scores) -> Tensor:
        """[G] float64: the loss of each pair."""

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"preference": groups, **({"nll": chosen_tokens} if self.sft_weight else {})}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        terms = {"preference": self.preference(scores).sum()}
        if self.sft_weight:
            terms["nll"] = self.sft_weight * chosen_nll(scores)
        return terms

    def margins(self, scores: Scores) -> Tensor:
        return self.sides(scores).margin

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        pairs, sides = scores.structure.num_groups, self.sides(scores)
        logps, lengths = Sides.of(scores.sums(scores.logps)), Sides.of(scores.lengths)
        metrics: dict[str, Mean] = {
            "rewards/margins": (self.beta * sides.margin.sum(), pairs),
            # a tie is not correct: at the first step policy = reference and the accuracy is 0
            "rewards/accuracies": ((sides.chosen > sides.rejected).sum(), pairs),
        }
        num_tokens = {"chosen": chosen_tokens(scores.structure), "rejected": rejected_tokens(scores.structure)}
        for name in Sides._fields:
            side, logp, tokens = (getattr(x, name).sum() for x in (sides, logps, lengths))
            metrics[f"rewards/{name}"] = (self.beta * side, pairs)
            metrics[f"logps/{name}"] = (logp, pairs)
            metrics[f"logps_per_token/{name}"] = (logp, num_tokens[name])
            metrics[f"lengths/{name}"] = (tokens, pairs)
        return metrics


class ReferenceObjective(PairObjective[R]):
    """Pairs compared with a reference: a side is the log-ratio of policy to reference."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"ref_logps"})

    @property
    def beta(self) -> float:
        return self.settings.beta

    def sides(self, scores: Scores) -> Sides:
        return Sides.of(scores.log_ratios)


def chosen_tokens(structure: Structure) -> int:
    """A `Unit`: scored tokens of the chosen completions, by which their likelihood is divided."""
    return sum(structure.tokens_per_completion[0::2])


def rejected_tokens(structure: Structure) -> int:
    """Scored tokens of the rejected completions."""
    return sum(structure.tokens_per_completion[1::2])


def chosen_row_tokens(structure: Structure) -> int:
    """Scored tokens of the chosen completions and of their prompts."""
    return chosen_tokens(structure) + structure.num_prompt_tokens


def chosen_nll(scores: Scores) -> Tensor:
    """Scalar: minus the sum of the chosen completions' log-probs."""
    return -Sides.of(scores.sums(scores.logps)).chosen.sum()


def means(scores: Scores) -> Sides:
    """The mean log-prob of the tokens of each completion."""
    return Sides.of(scores.sums(scores.logps) / scores.lengths)


def smoothed(logits: Tensor, e: float) -> Tensor:
    """Cross-entropy of the preference, with a share `e` of the labels flipped: -(1 - e) ls(x) - e ls(-x)."""
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)
