"""The teacher of a policy: a second model, whose distribution of every token the policy's is compared with. Floor 2.

Shapes: M scored tokens, D width of the policy.

The two are compared within the policy's forward pass, on the same batch: the teacher's body runs without gradients, and
`kernels/divergence.py` goes through both heads. So the divergence is a column that the policy supplies, and a step is
cut, resumed and evaluated like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from strop.batch import Batch, TokenScores
from strop.columns import Columns
from strop.policy.kernels.divergence import Head, divergences
from strop.policy.model.task import head_of

if TYPE_CHECKING:
    from strop.policy.policy import Policy

DIVERGENCE = "divergence"
"""A column per token: how far the policy's distribution is from the teacher's."""

TEACHER_LOGPS = "teacher_logps"
"""A column per token: its log-prob under the teacher."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model to be compared with. beta, temperature: as `divergences` takes them."""

    model: Policy
    beta: float
    temperature: float

    def logps(self, batch: Batch) -> Tensor:
        """[M] the log-probs of the batch's scored tokens under the teacher."""
        with self.model.scoring():
            found: TokenScores = self.model(replace(batch, wants=frozenset()))
        self.model.strategy.forget_passes()
        return found.logps

    def compared(self, student: Policy, batch: Batch, hidden: Tensor) -> TokenScores:
        """The student's log-probs, without gradients, and the column `DIVERGENCE`, with them.

        Args:
            hidden: [M, D] the student's hidden states at the scored tokens.
        """
        found = divergences(
            _head(student, hidden, self.temperature),
            self._scored(batch),
            batch.targets,
            beta=self.beta,
            temperature=self.temperature,
            compute=student.head_dtype,
        )
        return TokenScores(found.logps, Columns(per_token={DIVERGENCE: found.divergence}))

    def _scored(self, batch: Batch) -> Head:
        """The teacher's head, with its hidden states at the scored tokens. The head is used again in the backward pass
        of the student, when the teacher's own weights may lie in parts again."""

        def computed() -> Head:
            hidden = self.model.hidden_states(batch).to(self.model.precision.master)
            head = _head(self.model, hidden.flatten(0, 1).index_select(0, batch.scored_positions), self.temperature)
            return head._replace(weight=self.model.strategy.outlasting(head.weight))

        with self.model.scoring(), self.model.precision.autocast(batch.input_ids.device):
            found = self.model.own_pass(computed)
        self.model.strategy.forget_passes()
        return found


def _head(policy: Policy, hidden: Tensor, temperature: float) -> Head:
    head, transform = head_of(policy.base), policy.transform
    if temperature != 1.0:
        transform = transform.at_temperature(temperature)
    return Head(hidden, head.weight, getattr(head, "bias", None), transform)
