"""One optimizer step's forward and backward: scores, the loss of the whole step, its gradients. Floor 3.

Shapes: M scored tokens of a micro-batch.

The loss of a step is sum over terms of (the term's sum over the step) / (the count of its unit over the step). The
counts follow from the batches' structure, so they are known before the first forward pass and every micro-batch's
share is divided by the same number: how the step is cut changes nothing.

An objective whose terms hold a statistic of the whole step gets the whole step: a pass without gradients collects
all log-probs, the objective is differentiated with respect to them, and a second pass carries these coefficients
d loss / d logp back. A step of one micro-batch is the whole step already and needs no extra pass.

An objective that needs mismatched completions gets their scores with those of every micro-batch: one pass without
gradients over these completions alone, whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from strop.batch import Batch, Scores, Unit
from strop.config.methods import MethodSettings
from strop.objectives.base import Mean, Objective
from strop.types import Group

Forward = Callable[[Batch], Tensor]
"""A policy: micro-batch -> [M + P] log-probs of its scored tokens, or [2, M + P] with collisions."""

Counts = Mapping[str, int]
"""Term name -> what its sum is divided by."""


@dataclass(frozen=True)
class StepScores:
    """What a step's (or an evaluation's) forward passes gave, with no gradients attached.

    loss: the step's. terms: each term's share of it. metrics: (sum, count). margins: [G] or None.
    """

    scores: Scores
    loss: float
    terms: Mapping[str, float]
    metrics: Mapping[str, Mean]
    margins: Tensor | None


def count_units(units: Mapping[str, Unit], batches: Sequence[Batch]) -> Counts:
    """Term name -> the count of its unit over the whole step."""
    return {term: sum(b.count(unit) for b in batches) for term, unit in units.items()}


def step_loss(objective: Objective[MethodSettings], scores: Scores, counts: Counts) -> Tensor:
    """The share that `scores` has in the loss of a step with these counts; a float64 scalar."""
    terms = objective.terms(scores)
    return torch.stack([terms[t] / counts[t] for t in sorted(terms)]).sum()


def forward_backward(
    policy: Forward,
    objective: Objective[MethodSettings],
    batches: Sequence[Batch],
    mismatched: Sequence[Batch] = (),
    *,
    seed: tuple[int, int] = (0, 0),
    scale: float = 1.0,
) -> StepScores:
    """Add the gradients of one step's loss, times `scale`, to the weights and return its scores.

    Args:
        batches: the micro-batches of the step.
        mismatched: those of its mismatched completions, where the objective needs them.
        seed: (run seed, step): dropout's random state is a function of it and of the micro-batch's place.
        scale: the loss scale of float16.
    """
    counts = count_units(objective.units, batches)
    with torch.no_grad():
        apart = [Scores.of(b, _seeded(policy, b, seed, len(batches) + i)) for i, b in enumerate(mismatched)]
    others = Scores.join(apart) if apart else None
    if objective.whole_step and len(batches) > 1:
        with torch.no_grad():
            first = [Scores.of(b, _seeded(policy, b, seed, i), others) for i, b in enumerate(batches)]
        whole = Scores.join(first)
        assert whole.prompt_logps is None, "coefficients are those of completions"
        leaf = whole.logps.detach().requires_grad_()
        (coefficients,) = torch.autograd.grad(step_loss(objective, replace(whole, logps=leaf), counts), leaf)
        shares = torch.split(coefficients, [len(part.logps) for part in first])
        for i, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            torch.autograd.backward((Scores.of(batch, _seeded(policy, batch, seed, i)).logps * share).sum() * scale)
        return summarise(objective, whole)
    parts = []
    for i, batch in enumerate(batches):
        scores = Scores.of(batch, _seeded(policy, batch, seed, i), others)
        torch.autograd.backward(step_loss(objective, scores, counts) * scale)
        parts.append(scores.detached())
        # Else the nodes of its graph, which hold no more tensors, still lie among the next one's in the heap and split
        # what it frees: rows of 1,900 tokens came to a peak of 4.9 GB instead of 3.6.
        del scores
    return summarise(objective, Scores.join(parts))


def summarise(objective: Objective[MethodSettings], scores: Scores) -> StepScores:
    """Loss, metrics and margins of scores that are a whole step (or a whole evaluation)."""
    with torch.no_grad():
        terms = objective.terms(scores)
        shares = {t: float(terms[t] / scores.count(unit)) for t, unit in objective.units.items()}
        return StepScores(scores, sum(shares.values()), shares, objective.metrics(scores), objective.margins(scores))


def _seeded(policy: Forward, batch: Batch, seed: tuple[int, int], micro_batch: int) -> Tensor:
    torch.manual_seed(int(np.random.SeedSequence([*seed, micro_batch]).generate_state(1)[0]))
    return policy(batch)


def suspect_rows(result: StepScores, groups: Sequence[Group], most: int = 8) -> str:
    """The rows with log-probs that are not finite; where all are finite, all rows of the step."""
    sums = result.scores.sums(result.scores.logps)
    bad = sorted(set(result.scores.group_index[~torch.isfinite(sums)].tolist()))
    rows = [str(groups[i].origin) for i in bad or range(len(groups))]
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
