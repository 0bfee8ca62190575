"""The rows of a step: text, log-probs, rewards, and how much of the gradient comes from each. Floor 8.

Shapes: M scored tokens, C completions, G groups. A row's share of the gradient is its share of the sum of
|d loss / d x| over all numbers x that the policy gives for the step, such as log-probs of trained tokens: how hard the
loss pulls at it, before that goes through the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.batch import Scores
from strop.columns import Columns, Structure
from strop.config.methods import MethodSettings
from strop.engine.gradients import Gradients
from strop.engine.ledger import row_hash
from strop.engine.step import step_loss, with_leaves
from strop.objectives.base import Objective
from strop.policy.policy import Policy
from strop.session import Session
from strop.types import Completion


@dataclass(frozen=True)
class CompletionScores:
    """A completion of a row.

    tokens: the text of each. logps: of each token; None for one that is not trained. logp: the sum; None of a reward
    model, which gives none. ref_logp: under the reference; None without one. reward: what the reward model that is
    trained gives; else beta times the log-ratio where there is a reference, or what a function gave.
    """

    tokens: Sequence[str]
    logps: Sequence[float | None]
    logp: float | None
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
    pulled = pulls(objective, scores)
    total = sum(pulled) or 1.0
    judges, margins = session.policy.is_reward_model, passes.result.margins
    rewards = scores.sums(scores.logps) if judges else _rewards(objective, scores)
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
                    [None] * len(completion.ids) if judges else _spread(completion, logps[i]),
                    None if judges else sums[i],
                    None if ref is None else ref[i],
                    None if rewards is None else float(rewards[i]),
                )
                for i, completion in zip(own, group.completions, strict=True)
            ],
            None if margins is None else float(margins[number]),
            group.label,
            pulled[number] / total,
        )
        at = own.stop
    return [rows[place] for place in sorted(rows)]


def pulls(objective: Objective[MethodSettings], scores: Scores) -> list[float]:
    """[G] the sum of |d loss / d x| over all numbers x that the policy gives for a group, of the loss of a whole step:
    log-probs, and the columns that it supplies, such as the divergence from a teacher."""
    given, of_policy = with_leaves(scores, objective.reads & Policy.SUPPLIES)
    counts = {term: unit(scores.structure) for term, unit in objective.units.items()}
    loss = step_loss(objective, given, counts)
    whole = of_policy._replace(per_token={**of_policy.per_token, "log-probs": given.logps})
    return [float(pulled) for pulled in _sums_of_slopes(loss, whole, scores.structure)]


def _sums_of_slopes(loss: Tensor, whole: Columns, structure: Structure) -> Iterator[Tensor]:
    """By group, the sum of |d loss / d x| over all numbers x of the columns."""
    inputs = [values for level in whole for values in level.values()]
    slopes = iter(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    by_name = Columns(*({name: next(slopes) for name in level} for level in whole))
    for of_group in by_name.split(structure):
        yield torch.stack([slope.double().abs().sum() for level in of_group for slope in level.values()]).sum()


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
