"""One record per step: whole, alike in a resumed run, and what everything else is made from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import strop
from strop.engine.outputs import RunOutputs
from strop.engine.step_records import StepRecord


@pytest.fixture
def records(watched: pytest.MonkeyPatch) -> list[StepRecord]:
    """Every record that a run emits."""
    seen: list[StepRecord] = []
    told = RunOutputs.step

    def step(self: RunOutputs, record: StepRecord) -> None:
        seen.append(record)
        told(self, record)

    watched.setattr(RunOutputs, "step", step)
    return seen


def test_a_record_says_what_the_step_was(runs: Any, records: list[StepRecord]) -> None:
    run = runs(max_steps=5, logging_steps=1)
    prepared = runs.prepare(max_steps=5)
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    for record, line, margins in zip(
        records, [m for m in run.metrics if m["split"] == "train"], run.margins, strict=True
    ):
        assert record.indices == prepared.plan.groups(record.step)
        assert sorted(place for part in record.cut for place in part) == list(range(record.num_groups))
        assert (record.epoch, record.step_in_epoch) == prepared.plan.position(record.step)
        assert (record.loss, record.grad_norm, record.learning_rate) == (
            line["loss"],
            line["grad_norm"],
            line["learning_rate"],
        )
        assert record.epochs == line["epoch"]
        assert line["num_scored_tokens"] == record.num_scored_tokens
        total, count = record.metrics["rewards/margins"]
        assert line["rewards/margins"] == total / count
        assert record.margins is not None
        saved = np.load(run.path / "logs/margins" / margins["npy"])
        assert saved.tolist() == record.margins.astype(np.float32).tolist()
    assert sum(record.num_tokens for record in records) == run.metrics[-1].get("tokens", run.series("tokens")[-1])
    assert len({record.weights for record in records}) == len(records)  # every step moves something


@pytest.mark.nightly
def test_a_resumed_run_has_the_records_of_an_unbroken_one(runs: Any, records: list[StepRecord]) -> None:
    keys = {"lora.lora_dropout": 0.2, "training.save_steps": 2}
    run = runs(keys, max_steps=5)
    unbroken = [replace(record, seconds=0.0, margins=None) for record in records]
    margins = [record.margins for record in records]
    records.clear()
    config = runs.config(keys, max_steps=5)
    strop.train(config, resume=str(run.path / "checkpoint-2"))
    assert [replace(record, seconds=0.0, margins=None) for record in records] == unbroken[2:]
    for record, expected in zip(records, margins[2:], strict=True):
        assert np.array_equal(record.margins, expected)
