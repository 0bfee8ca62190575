"""What every loss must be where the answer is known without a peer (policy = reference, swapped sides, scaling)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strop.batch import Scores
from strop.config.methods import DpoSettings, SftSettings
from strop.objectives.dpo import Dpo
from strop.objectives.sft import Sft

PAIRS = 3


def pairs(chosen: Tensor, rejected: Tensor, ref: Tensor | None = None, tokens: int = 1) -> Scores:
    """Scores of pairs whose completions have `tokens` tokens of equal log-prob and these sums."""
    logps = torch.stack([chosen, rejected], 1).flatten().double()
    n = len(logps)
    return Scores(
        (logps / tokens).repeat_interleave(tokens),
        (torch.zeros(n) if ref is None else ref / tokens).double().repeat_interleave(tokens),
        torch.arange(n).repeat_interleave(tokens),
        torch.arange(n // 2).repeat_interleave(2),
    )


def loss(settings: DpoSettings, scores: Scores) -> float:
    return float(Dpo(settings).terms(scores)["preference"]) / scores.num_groups


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": "sigmoid"}, lambda b: math.log(2)),
        ({"loss_type": "sigmoid", "label_smoothing": 0.3}, lambda b: math.log(2)),
        ({"loss_type": "hinge"}, lambda b: 1.0),
        ({"loss_type": "ipo"}, lambda b: (1 / (2 * b)) ** 2),
        ({"loss_type": "ipo", "ipo_norm": "sum"}, lambda b: (1 / (2 * b)) ** 2),
        ({"loss_type": "kto_pair"}, lambda b: 1.0),
    ],
)
def test_policy_equal_to_reference(settings, expected, beta: float) -> None:  # type: ignore[no-untyped-def]
    logps = -torch.rand(2 * PAIRS) * 50
    scores = pairs(logps[0::2], logps[1::2], ref=logps)
    objective = Dpo(DpoSettings(beta=beta, **settings))
    assert loss(objective.settings, scores) == pytest.approx(expected(beta), rel=1e-12)
    metrics = {k: float(total) / n for k, (total, n) in objective.metrics(scores).items()}
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0, "ties are not correct"
    assert objective.margins(scores).tolist() == [0.0] * PAIRS


numbers = st.floats(-100, 0)
sides = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4)


@given(sides)
def test_swapping_the_sides_turns_the_margin_round(some: list[tuple[float, float]]) -> None:
    a, b = torch.tensor([x for x, _ in some]), torch.tensor([y for _, y in some])
    objective = Dpo(DpoSettings())
    torch.testing.assert_close(objective.margins(pairs(a, b)), -objective.margins(pairs(b, a)))


@given(sides, st.floats(0.1, 10))
def test_sigmoid_sees_only_beta_times_log_probs(some: list[tuple[float, float]], k: float) -> None:
    a, b = torch.tensor([x for x, _ in some]).double(), torch.tensor([y for _, y in some]).double()
    scaled = loss(DpoSettings(beta=0.1 * k), pairs(a / k, b / k))
    assert scaled == pytest.approx(loss(DpoSettings(beta=0.1), pairs(a, b)), rel=1e-9)


def test_only_the_length_normalised_loss_ignores_repetition() -> None:
    a, b = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -1.0])
    once, twice = pairs(a, b, tokens=1), pairs(2 * a, 2 * b, tokens=2)
    mean, total, dpo = (
        DpoSettings(loss_type="ipo"),
        DpoSettings(loss_type="ipo", ipo_norm="sum"),
        DpoSettings(),
    )
    assert loss(mean, once) == pytest.approx(loss(mean, twice))
    assert loss(total, once) != pytest.approx(loss(total, twice))
    assert loss(dpo, once) != pytest.approx(loss(dpo, twice))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "kto_pair"])
@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_extreme_log_probs_stay_finite(loss_type: str, size: float) -> None:
    a, b = torch.tensor([-size, 0.0]), torch.tensor([0.0, -size])
    for beta in (1e-8, 1e8):
        scores = pairs(a, b)
        leaf = scores.logps.clone().requires_grad_()
        scores = Scores(leaf, scores.ref_logps, scores.completion_index, scores.group_index)
        value = Dpo(DpoSettings(beta=beta, loss_type=loss_type)).terms(scores)["preference"]  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value, leaf)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=5))
def test_sft_means_are_over_tokens_or_sequences(rows: list[list[float]]) -> None:
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    index = torch.repeat_interleave(torch.tensor([len(r) for r in rows]))
    scores = Scores(flat, None, index, torch.arange(len(rows)))

    def value(settings: SftSettings) -> float:
        objective = Sft(settings)
        return float(objective.terms(scores)["nll"]) / scores.count(objective.units["nll"])

    assert value(SftSettings()) == pytest.approx(-float(flat.mean()), abs=1e-12)
    by_hand = sum(sum(r) / len(r) for r in rows) / len(rows)
    assert value(SftSettings(loss_reduction="sequences")) == pytest.approx(-by_hand, abs=1e-9)
