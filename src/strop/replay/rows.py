"""The rows of a step: text, log-probs, rewards, and how much of the gradient comes from each. Floor 8.

Shapes: M scored tokens, C completions, G groups. A row's share of the gradient is its share of the sum of |d loss / d
log-prob| over all trained tokens of the step: how hard the loss pulls at it, before that goes through the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strop.batch import Scores
from strop.config.methods import MethodSettings
from strop.engine.gradients import Gradients
from strop.engine.ledger import row_hash
from strop.engine.step import step_loss
from strop.objectives.base import Objective
from strop.session import Session
from strop.types import Completion


@dataclass(frozen=True)
class CompletionScores:
    """A completion of a row.

    tokens: the text of each. logps: of each token; None for one that is not trained. logp: the sum. ref_logp: under the
    reference; None without one. reward: beta times the log-ratio where there is a reference, or what a function gave.
    """

    tokens: Sequence[str]
    logps: Sequence[float | None]
    logp: float
    ref_logp: float | None
    reward: float | None


@dataclass(frozen=True)
class RowScores:
    """A row of the step. margin: chosen minus rejected, not times beta, for methods on pairs. label: of a labelled row.
    share: of the gradient, see above."""

    hash: str
    source: str
    prompt: str
    completions: Sequence[CompletionScores]
    margin: float | None
    label: bool | None
    share: float


def row_scores(session: Session, gradients: Gradients, step: int) -> list[RowScores]:
    """Scores the rows of a step with the weights before it. No gradient is left behind."""
    passes = gradients.take(step, 1.0)
    session.policy.zero_grad(set_to_none=True)
    objective, scores = session.prepared.objective, passes.result.scores
    pulls = scores.sums(pull(objective, scores).abs())
    total = float(pulls.sum()) or 1.0
    margins, rewards = passes.result.margins, _rewards(objective, scores)
    logps = [each.tolist() for each in torch.split(scores.logps.double(), list(scores.structure.tokens_per_completion))]
    sums = scores.sums(scores.logps).tolist()
    ref = scores.sums(scores["ref_logps"]).tolist() if "ref_logps" in objective.reads else None
    rows: dict[int, RowScores] = {}
    at = 0
    for number, place in enumerate(passes.order):
        group = passes.own.groups.groups[place]
        own = range(at, at + len(group.completions))
        rows[place] = RowScores(
            row_hash(group),
            str(group.origin),
            _text(session, group.prompt_ids),
            [
                CompletionScores(
                    [_text(session, [token]) for token in completion.ids],
                    _spread(completion, logps[i]),
                    sums[i],
                    None if ref is None else ref[i],
                    None if rewards is None else float(rewards[i]),
                )
                for i, completion in zip(own, group.completions, strict=True)
            ],
            None if margins is None else float(margins[number]),
            group.label,
            sum(float(pulls[i]) for i in own) / total,
        )
        at = own.stop
    return [rows[place] for place in sorted(rows)]


def pull(objective: Objective[MethodSettings], scores: Scores) -> Tensor:
    """[M] d loss / d log-prob of each scored token, of the loss of a whole step."""
    leaf = scores.logps.detach().requires_grad_()
    counts = {term: unit(scores.structure) for term, unit in objective.units.items()}
    loss = step_loss(objective, replace(scores, logps=leaf), counts)
    (found,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return found


def _rewards(objective: Objective[MethodSettings], scores: Scores) -> Tensor | None:
    """[C] what a function gave each completion, or beta times its log-ratio; None where the method has neither."""
    if "rewards" in scores.columns.names:
        return scores["rewards"]
    beta = getattr(objective.settings, "beta", None)
    return beta * scores.log_ratios if beta is not None and "ref_logps" in objective.reads else None


def _spread(completion: Completion, logps: Sequence[float]) -> list[float | None]:
    """The log-probs of trained tokens at the places of these tokens."""
    left = iter(logps)
    return [next(left) if trained else None for trained in completion.loss_mask]


def _text(session: Session, ids: Sequence[int]) -> str:
    return str(session.prepared.tokenizer.decode(list(ids), skip_special_tokens=False))
