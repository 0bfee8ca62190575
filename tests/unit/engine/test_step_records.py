"""The record of a step, and what the window makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from strop.engine.metrics import MetricWindow
from strop.engine.step_records import StepRecord, WeightsDigest
from strop.engine.train_state import TrainState
from worlds import replicated

RECORD = StepRecord(
    step=3,
    epoch=0,
    step_in_epoch=2,
    epochs=0.75,
    indices=(4, 1, 0),
    cut=((0, 2), (1,)),
    seed=(7, 3),
    learning_rate=1e-3,
    loss=0.5,
    terms={"a": 0.2, "b": 0.3},
    grad_norm=2.0,
    clipped=True,
    skipped=False,
    metrics={"rewards/margins": (3.0, 3)},
    margins=None,
    num_groups=3,
    num_zero_signal_groups=1,
    num_scored_tokens=20,
    num_tokens=50,
    seconds=0.5,
    weights="00",
    update={"update_ratio": (0.01, 1)},
)


def test_a_window_is_made_from_records() -> None:
    window = MetricWindow()
    window.add(RECORD)
    window.add(
        replace(
            RECORD,
            loss=1.5,
            grad_norm=4.0,
            clipped=False,
            metrics={"rewards/margins": (0.0, 1)},
            update={},
            weights="01",
        )
    )
    assert window.flush() == {
        "loss": 1.0,
        "loss/a": 0.2,
        "loss/b": 0.3,
        "grad_norm": 3.0,
        "clipped": 0.5,
        "rewards/margins": 0.75,
        "update_ratio": 0.01,
        "num_groups": 6,
        "num_zero_signal_groups": 2,
        "num_scored_tokens": 40,
        "weights_digest": "01",
    }
    assert window.is_empty and not window.flush()


def test_of_a_skipped_step_only_counts_are_kept() -> None:
    window, state = MetricWindow(), TrainState()
    skipped = replace(RECORD, skipped=True, loss=float("nan"), grad_norm=float("inf"))
    for record in (skipped, skipped):
        window.add(record)
        state.add(record)
    assert window.flush() == {
        "num_groups": 6,
        "num_zero_signal_groups": 2,
        "num_scored_tokens": 40,
        "num_skipped_steps": 2,
        "weights_digest": "00",
    }
    assert (state.num_skipped, state.skipped_in_a_row, state.tokens) == (2, 2, 100)
    state.add(RECORD)
    assert (state.num_skipped, state.skipped_in_a_row, state.step) == (2, 0, 3)


def digest_of(weights: Sequence[nn.Parameter]) -> WeightsDigest:
    return WeightsDigest(replicated({str(number): weight for number, weight in enumerate(weights)}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_digest_is_of_the_weights_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((50, 40), (3,), (), (0, 4), (7, 30))]
    weights.append(nn.Parameter(torch.randn(6, 5, dtype=dtype).T))  # not contiguous
    digest = digest_of(weights)

    def now() -> str:
        return digest.of(digest.sample())

    assert len(digest.sample()) <= len(weights) * WeightsDigest.PER_TENSOR
    seen = [now()]
    assert now() == seen[0]
    for weight in weights:
        if weight.numel():
            with torch.no_grad():
                weight.add_(torch.finfo(dtype).eps * 4 * weight.abs().max())  # of every tensor something is looked at
            seen.append(now())
    assert len(set(seen)) == len(seen)
    assert digest_of([nn.Parameter(w.detach().clone()) for w in weights]).sample().tolist() == (
        digest.sample().tolist()
    )
