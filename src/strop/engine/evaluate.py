"""Loss and metrics on the validation groups: one evaluation counts as one step. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from strop.batch import Batch, Scores
from strop.config.methods import MethodSettings
from strop.engine.step import Forward, StepScores, summarise
from strop.objectives.base import Objective


def evaluate(
    policy: Forward,
    objective: Objective[MethodSettings],
    batches: Iterable[Batch],
    mismatched: Iterable[Batch] = (),
    done: Callable[[int], None] = lambda num_groups: None,
) -> StepScores:
    """Score `batches` without gradients (the caller switches dropout off) and sum over all of them at once.

    Args:
        mismatched: the micro-batches of the mismatched completions, where the objective needs them.
        done: called with the number of groups of each micro-batch as it is scored.
    """
    parts = []
    with torch.no_grad():
        apart = [Scores.of(batch, policy(batch)) for batch in mismatched]
        others = Scores.join(apart) if apart else None
        for batch in batches:
            parts.append(Scores.of(batch, policy(batch), others))
            done(batch.num_groups)
    return summarise(objective, Scores.join(parts))
