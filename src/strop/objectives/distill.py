"""Distillation: the divergence from a teacher's distribution of every token (GKD, arXiv 2306.13649).

With s and t the student's and the teacher's distributions of the next token at the same place of a completion, both at
`temperature`, and m = beta t + (1 - beta) s,

    beta 0          KL(t || s), forward: covers all that the teacher would write
    beta 1          KL(s || t), reverse: keeps to what the teacher finds likely
    between         beta KL(t || m) + (1 - beta) KL(s || m), the generalised Jensen-Shannon divergence (eq. 3)

    loss = the sum over the trained tokens of the step / their number

The sum goes over the whole vocabulary, tile by tile through both heads. Completions are those of the rows, or, with
rollout, those that the student samples; the teacher reads them as they are, and no gradient goes through the sampling.
TRL's GKDTrainer has the same loss (`generalized_jsd_loss`), at a temperature of 0.9 by default.

With `distill_loss: policy_gradient`, tokens that the student sampled are weighed as by a reward. With old the student
that sampled, and A = log t - log old without a gradient (its mean is the reverse divergence, negated):

    loss = the sum over the trained tokens of - A s / old / their number

Only log-probs of the tokens that came are needed of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from strop.batch import Scores
from strop.columns import Unit, tokens
from strop.config.methods import DistillSettings
from strop.objectives.base import OLD_LOGPS, Mean, Objective, old_logps


class Distill(Objective[DistillSettings]):
    """The mean divergence from a teacher."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "reverse_kl": "policy_gradient: mean of log s - log t per sampled token, an estimate of the reverse "
        "divergence; should fall",
        "divergence": "mean divergence from the teacher per token, of the kind that beta chooses; should fall, on "
        "held-out rows too",
        "nll": "negative log-likelihood per token of the completions under the student, at temperature 1; with "
        "rollout, at that of sampling",
        "lengths/completion": "trained tokens of a completion",
    }

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"teacher_logps" if self._samples else "divergence"})

    @property
    def may_read(self) -> frozenset[str]:
        return frozenset({OLD_LOGPS} if self._samples else ())

    @property
    def _samples(self) -> bool:
        return self.settings.distill_loss == "policy_gradient"

    @property
    def has_loss_on_samples(self) -> bool:
        return True

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"policy" if self._samples else "divergence": tokens}

    def describe(self) -> Iterator[str]:
        yield (
            f"teacher: {self.settings.teacher_model_id}, a second model in memory, which reads every batch; the time "
            "that it takes is not in the prediction"
        )

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        if self._samples:
            old = old_logps(scores)
            advantages = scores["teacher_logps"].double() - old
            return {"policy": -(advantages * (scores.logps.double() - old).exp()).sum()}
        return {"divergence": scores["divergence"].double().sum()}

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        num_tokens = scores.structure.num_tokens
        apart = (
            scores.logps.double() - scores["teacher_logps"].double() if self._samples else scores["divergence"].double()
        )
        return {
            "reverse_kl" if self._samples else "divergence": (apart.sum(), num_tokens),
            "nll": (-scores.logps.double().sum(), num_tokens),
            "lengths/completion": (scores.lengths.sum(), scores.structure.num_completions),
        }
