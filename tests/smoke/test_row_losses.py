"""The loss of every validation row: their mean is the loss of the evaluation, and noise is not called a worse model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import strop
from strop.engine import row_losses
from strop.runfiles import EVALUATIONS

METHODS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"method": "sft", "post_training.loss_reduction": "tokens"},
    "dpo": {"post_training.sft_weight": 0.3},
    "kto": {"method": "kto"},
    "orpo": {"method": "orpo", "post_training.orpo_nll": "full"},
}


def arrays(run: Path) -> dict[int, np.ndarray]:
    return {int(p.stem.removeprefix("step_")): np.load(p) for p in sorted((run / "logs" / EVALUATIONS).glob("*.npy"))}


@pytest.mark.parametrize("name", ["dpo", "kto", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("sft", "orpo"))])
def test_they_add_up_to_the_loss(name: str, runs: Any) -> None:
    run = runs(METHODS[name], max_steps=2, eval_steps=1)
    found = arrays(run.path)
    assert list(found) == [0, 1, 2]
    losses = {line["step"]: (line["loss"], line["num_groups"]) for line in run.metrics if line["split"] == "eval"}
    for step, rows in found.items():
        loss, num_rows = losses[step]
        assert len(rows) == num_rows and math.isclose(rows.mean(), loss, rel_tol=1e-6)


def test_a_loss_with_a_statistic_of_all_rows_has_none(runs: Any) -> None:
    run = runs({"post_training.loss_type": "kto_pair"}, max_steps=1)
    assert not (run.path / "logs" / EVALUATIONS).exists()


def test_a_resume_has_them_as_an_unbroken_run(runs: Any) -> None:
    keys = {"training.save_steps": 1}
    run = runs(keys, max_steps=3, eval_steps=1, fresh=True)
    unbroken = arrays(run.path)
    (run.path / "final").rename(run.path / "earlier")
    config = runs.config(keys, max_steps=3, eval_steps=1, output_dir=str(run.path.parent))
    strop.train(config, resume=str(run.path / "checkpoint-2"))
    resumed = arrays(run.path)
    assert list(resumed) == [0, 1, 2, 3]
    assert all(np.array_equal(resumed[step], unbroken[step]) for step in unbroken)


def test_of_many_rows_evenly_spaced_ones_are_kept(runs: Any, watched: pytest.MonkeyPatch) -> None:
    watched.setattr(row_losses, "MOST_ROWS", 3)
    some = arrays(runs(max_steps=1).path)
    watched.setattr(row_losses, "MOST_ROWS", 99)
    every = arrays(runs(max_steps=1).path)
    assert all(np.array_equal(some[step], every[step][[0, 1, 3]]) for step in every)
