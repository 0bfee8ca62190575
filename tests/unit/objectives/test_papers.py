"""Every objective against the same loss in plain numpy, and its gradient against differences of that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from papers import Step, step_loss
from strop.batch import Scores
from strop.config.methods import MethodSettings
from strop.objectives.base import build_objective
from variants import SETTINGS, name


def make_step(rows: str, seed: int) -> Step:
    """Eight groups of some tokens; the last ones are one token long, and equal."""
    draw = np.random.default_rng(seed)
    lengths = [(3, 5), (7, 2), (4, 4), (1, 6), (5, 1), (2, 9), (1, 1), (3, 3)]

    def completion(n: int) -> tuple[Any, Any]:
        return -draw.gamma(1.0, 1.5, n), -draw.gamma(1.0, 1.5, n)

    step = [[completion(n) for n in pair[: 2 if rows == "pair" else 1]] for pair in lengths]
    step[-1][-1] = tuple(x.copy() for x in step[-1][0])  # type: ignore[assignment]
    return step


def make_others(seed: int) -> Step:
    """As drawn for z0: likelier under the policy, so that z0 is not 0, or less likely, so that it is."""
    return [[(p / 4 if seed % 2 else p, q)] for ((p, q),) in make_step("single", seed + 10)]


def to_scores(step: Step, others: Step | None = None) -> Scores:
    completions = [c for group in step for c in group]
    return Scores(
        torch.tensor(np.concatenate([policy for policy, _ in completions])),
        torch.tensor(np.concatenate([ref for _, ref in completions])),
        torch.repeat_interleave(torch.tensor([len(policy) for policy, _ in completions])),
        torch.repeat_interleave(torch.tensor([len(group) for group in step])),
        torch.tensor([i % 2 == 0 for i in range(len(step))]) if others else None,
        to_scores(others) if others else None,
    )


def moved(step: Step, direction: list[list[Any]], eps: float) -> Step:
    return [
        [(policy + eps * d, ref) for (policy, ref), d in zip(group, way, strict=True)]
        for group, way in zip(step, direction, strict=True)
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_loss_and_gradient_are_those_of_the_paper(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    for seed in range(3):
        step, others = make_step(objective.rows, seed), make_others(seed)
        scores = to_scores(step, others)
        leaf = scores.logps.requires_grad_()
        loss = sum(term / scores.count(objective.units[t]) for t, term in objective.terms(scores).items())
        assert isinstance(loss, torch.Tensor) and loss.dtype == torch.float64
        value = float(loss.detach())
        assert value == pytest.approx(step_loss(settings, step, others=others), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, leaf)
        draw = np.random.default_rng(seed)
        for _ in range(3):
            direction = [[draw.normal(size=len(policy)) for policy, _ in group] for group in step]
            eps = 1e-6
            ahead, behind = (step_loss(settings, moved(step, direction, e), step, others) for e in (eps, -eps))
            along = float(gradient @ torch.tensor(np.concatenate([d for way in direction for d in way])))
            assert along == pytest.approx((ahead - behind) / (2 * eps), rel=1e-6, abs=1e-8 * max(1, abs(value)))


@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_metrics_are_explained_and_counted(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    metrics = objective.metrics(to_scores(make_step(objective.rows, 0), make_others(0)))
    assert metrics.keys() <= objective.METRICS.keys()
    assert settings != type(settings)() or metrics.keys() == objective.METRICS.keys()
    assert all(np.isfinite(float(total)) and count > 0 for total, count in metrics.values())
