"""A step's loss and gradients do not depend on how it is cut, for every objective."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from strop.batch import Batch, Scores, pack, pad
from strop.config.methods import DpoSettings, MethodSettings, SftSettings
from strop.engine.step import StepScores, forward_backward
from strop.objectives.base import build_objective
from strop.types import Completion, Group, Origin

SETTINGS: list[MethodSettings] = [
    SftSettings(),
    SftSettings(loss_reduction="sequences"),
    DpoSettings(),
    DpoSettings(label_smoothing=0.2),
    DpoSettings(loss_type="hinge"),
    DpoSettings(loss_type="ipo"),
    DpoSettings(loss_type="ipo", ipo_norm="sum"),
    DpoSettings(loss_type="kto_pair"),
]


class Bigram(nn.Module):
    """The log-probs of a token given the one before it: the smallest policy that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.dropout = nn.Dropout(0.0)
        self.num_calls = 0

    def forward(self, batch: Batch) -> Tensor:
        self.num_calls += 1
        before = batch.input_ids.flatten()[batch.scored_positions]
        logits = self.dropout(self.table[before])
        return logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)


def make_groups(rows: str) -> list[Group]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> array[int]:
        return array("i", torch.randint(12, (n,), generator=generator).tolist())

    groups = []
    for i in range(8):
        answers = tuple(Completion(draw(n), b"\1" * n) for n in ((3 + i, 2 + i % 3)))
        groups.append(Group(draw(2 + i % 4), answers if rows == "pair" else answers[:1], Origin("rows", i + 1)))
    return groups


def run(settings: MethodSettings, cuts: list[int], layout=pack) -> tuple[StepScores, Tensor, int]:  # type: ignore[no-untyped-def]
    objective = build_objective(settings)
    policy, groups = Bigram(), make_groups(objective.rows)
    generator = torch.Generator().manual_seed(2)
    refs = [-torch.rand(g.num_scored, generator=generator).double() for g in groups]
    bounds = [0, *cuts, len(groups)]
    batches = [layout(groups[a:b], refs[a:b]) for a, b in pairwise(bounds)]
    result = forward_backward(policy, objective, batches)
    assert policy.table.grad is not None
    return result, policy.table.grad, policy.num_calls


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cuts", [[4], [1, 2, 3, 4, 5, 6, 7], [3, 4]], ids=str)
@pytest.mark.parametrize("layout", [pack, pad])
def test_the_cut_changes_nothing(settings: MethodSettings, cuts: list[int], layout) -> None:  # type: ignore[no-untyped-def]
    whole, gradient, _ = run(settings, [])
    cut, cut_gradient, _ = run(settings, cuts, layout)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-10, atol=1e-14)
    for name, (total, count) in whole.metrics.items():
        assert cut.metrics[name][1] == count
        assert float(cut.metrics[name][0]) == pytest.approx(float(total), rel=1e-10)


def test_only_a_statistic_over_several_micro_batches_costs_a_second_pass() -> None:
    assert run(DpoSettings(), [4])[2] == 2
    assert run(DpoSettings(loss_type="kto_pair"), [])[2] == 1
    assert run(DpoSettings(loss_type="kto_pair"), [4])[2] == 4


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_gradient_is_that_of_the_loss(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    groups = make_groups(objective.rows)
    batch = pack(groups, [-torch.rand(g.num_scored).double() for g in groups])
    policy = Bigram()
    forward_backward(policy, objective, [batch])
    assert policy.table.grad is not None
    direction = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    frozen = _statistic_of_the_step(settings, objective, batch, policy)

    def loss_at(step: float) -> float:
        with torch.no_grad():
            moved = Bigram()
            moved.table += step * direction
            scores = Scores.of(batch, moved(batch))
            return float(frozen(scores) / scores.count(next(iter(objective.units.values()))))

    eps = 1e-6
    numeric = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    assert float((policy.table.grad * direction).sum()) == pytest.approx(numeric, rel=1e-6, abs=1e-8)


def _statistic_of_the_step(settings, objective, batch, policy):  # type: ignore[no-untyped-def]
    """The loss as a function of the log-probs; kto_pair's z is a constant of the step, not a path of gradients."""
    if not (isinstance(settings, DpoSettings) and settings.loss_type == "kto_pair"):
        return lambda scores: objective.terms(scores)[next(iter(objective.units))]
    with torch.no_grad():
        at = Scores.of(batch, policy(batch))
        ratios = at.sums(at.logps - batch.ref_logps)
    z_c, z_r = ratios[0::2].mean().clamp(min=0), ratios[1::2].mean().clamp(min=0)
    beta = settings.beta

    def loss(scores: Scores) -> Tensor:
        u = scores.sums(scores.logps - batch.ref_logps)
        return (2 - torch.sigmoid(beta * (u[0::2] - z_r)) - torch.sigmoid(beta * (z_c - u[1::2]))).sum()

    return loss


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    objective, groups = build_objective(SftSettings()), make_groups("single")
    batches = [pack(groups[:4]), pack(groups[4:])]

    def loss(seed: tuple[int, int]) -> float:
        policy = Bigram()
        policy.dropout.p = 0.5
        torch.rand(7)  # the global state before a step must not matter
        return forward_backward(policy, objective, batches, seed=seed).loss

    assert loss((0, 1)) == loss((0, 1))
    assert loss((0, 1)) != loss((0, 2)) != loss((1, 2))
