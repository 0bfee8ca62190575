"""Every objective against the same loss in plain numpy, and its gradient against differences of that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from papers import Step, step_loss
from scored import make_scores
from strop.batch import Scores
from strop.columns import Columns
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


def make_extras(step: Step, seed: int) -> tuple[list[Any], list[list[Any]]]:
    """Log-probs of prompts, one of which has no token, and log(sum of p^2) at every token of a completion."""
    draw = np.random.default_rng(seed + 20)
    prompts = [-draw.gamma(1.0, 1.5, n) for n in (3, 1, 4, 2, 0, 2, 6, 3)]
    return prompts, [[-draw.gamma(1.0, 0.5, len(policy)) for policy, _ in group] for group in step]


def to_scores(step: Step, others: Step | None = None, prompts: Any = None, collisions: Any = None) -> Scores:
    completions = [c for group in step for c in group]
    per_token = {"ref_logps": torch.tensor(np.concatenate([ref for _, ref in completions]))}
    if collisions is not None:
        per_token["collisions"] = torch.tensor(np.concatenate([x for group in collisions for x in group]))
    columns = Columns(
        per_token=per_token,
        per_group={"labels": torch.tensor([i % 2 == 0 for i in range(len(step))])} if others else {},
        per_prompt_token={} if prompts is None else {"prompt_logps": torch.tensor(np.concatenate(prompts))},
    )
    return make_scores(
        torch.tensor(np.concatenate([policy for policy, _ in completions])),
        [len(policy) for policy, _ in completions],
        [len(group) for group in step],
        columns,
        prompt_lengths=None if prompts is None else [1 + len(x) for x in prompts],
        also={"mismatched": to_scores(others)} if others else None,
    )


def moved(step: Step, direction: list[list[Any]], eps: float) -> Step:
    return [
        [(policy + eps * d, ref) for (policy, ref), d in zip(group, way, strict=True)]
        for group, way in zip(step, direction, strict=True)
    ]


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.method != "grpo"], ids=name)
def test_loss_and_gradient_are_those_of_the_paper(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    for seed in range(3):
        step, others = make_step(objective.rows, seed), make_others(seed)
        prompts, collisions = make_extras(step, seed)
        scores = to_scores(step, others, prompts, collisions)
        leaves = [scores.logps.requires_grad_(), scores["prompt_logps"].requires_grad_()]
        loss = sum(term / objective.units[t](scores.structure) for t, term in objective.terms(scores).items())
        assert isinstance(loss, torch.Tensor) and loss.dtype == torch.float64
        value = float(loss.detach())
        assert value == pytest.approx(step_loss(settings, step, step, others, prompts, collisions), rel=1e-12)
        gradient = torch.cat(torch.autograd.grad(loss, leaves, materialize_grads=True))
        draw = np.random.default_rng(seed)
        for _ in range(3):
            direction = [[draw.normal(size=len(policy)) for policy, _ in group] for group in step]
            prompt_direction = [draw.normal(size=len(x)) for x in prompts]
            eps = 1e-6

            ahead, behind = (
                step_loss(
                    settings,
                    moved(step, direction, e),
                    step,
                    others,
                    [x + e * d for x, d in zip(prompts, prompt_direction, strict=True)],
                    collisions,
                )
                for e in (eps, -eps)
            )
            way = np.concatenate([*(d for group in direction for d in group), *prompt_direction])
            along = float(gradient @ torch.tensor(way))
            assert along == pytest.approx((ahead - behind) / (2 * eps), rel=1e-6, abs=1e-8 * max(1, abs(value)))


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.method != "grpo"], ids=name)
def test_metrics_are_explained_and_counted(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    step = make_step(objective.rows, 0)
    metrics = objective.metrics(to_scores(step, make_others(0), *make_extras(step, 0)))
    assert metrics.keys() <= objective.METRICS.keys()
    assert settings != type(settings)() or metrics.keys() == objective.METRICS.keys()
    assert all(np.isfinite(float(total)) and count > 0 for total, count in metrics.values())
