"""A loss that stands still is told after a tenth of the run, with a rate that would move it; one that moves is not."""

from __future__ import annotations

import math
import random
import re

import pytest

from strop.config import TrainingSection
from strop.engine.optim import learning_rate
from strop.engine.stalled_loss import StalledLoss

LN2 = math.log(2)


def rates(peak: float, num_steps: int) -> list[float]:
    training = TrainingSection(learning_rate=peak, warmup_ratio=0.1)
    return [learning_rate(step, num_steps, training) for step in range(1, num_steps + 1)]


def told(losses: list[float], peak: float = 1e-6) -> list[str]:
    """What is said in a run with these losses."""
    by_step = rates(peak, len(losses))
    stalled = StalledLoss(len(losses), lambda step: by_step[step - 1])
    return [note for step, loss in enumerate(losses, start=1) if (note := stalled.after(step, loss))]


def falling(slope: float, peak: float, num_steps: int, noise: float = 0.0) -> list[float]:
    """ln 2 less `slope` times the sum of the rates of the steps before."""
    draw, so_far, losses = random.Random(0), 0.0, []
    for rate in rates(peak, num_steps):
        losses.append(LN2 - slope * so_far + draw.gauss(0, noise) * (so_far > 0))
        so_far += rate
    return losses


@pytest.mark.parametrize("peak", [5e-7, 1e-5])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_rate_that_is_named_would_move_the_loss(share: float, peak: float) -> None:
    num_steps = 400
    slope = share * 0.01 * LN2 / sum(rates(peak, num_steps))  # the loss will fall by this share of what is wanted
    (note,) = told(falling(slope, peak, num_steps), peak)
    assert f"after 40 of {num_steps} steps" in note and "0.6931" in note
    (named,) = re.findall(r"of about (\S+) instead", note)
    assert float(named) == pytest.approx(peak / share, rel=0.3)  # one digit, from a tenth of the run
    better = falling(slope, float(named), num_steps)
    assert LN2 - better[-1] == pytest.approx(0.01 * LN2, rel=0.4)


def test_where_only_noise_is_seen_ten_times_the_rate_is_named() -> None:
    for losses in ([LN2] * 200, falling(0.0, 1e-6, 200, noise=1e-4)):
        (note,) = told(losses)
        assert "noise" in note and "1e-05 instead of 1e-06" in note


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_a_loss_that_moves_is_not_told(noise: float) -> None:
    num_steps = 400
    slope = 2 * 0.01 * LN2 / sum(rates(1e-6, num_steps))
    assert told(falling(slope, 1e-6, num_steps, noise)) == []
    assert told([3.9, 4.1, 3.8, 4.0] * 50) == []  # rows differ: nothing can be said
    assert told([LN2, 0.9, *[LN2] * 198]) == []


def test_short_runs_and_resumed_ones_say_nothing() -> None:
    assert told([LN2] * 40) == []  # a tenth of it is four steps
    stalled = StalledLoss(100, lambda step: 1e-6)
    assert [stalled.after(step, LN2) for step in range(5, 101)] == [None] * 96
