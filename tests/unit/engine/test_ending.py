"""How a run ended is read off its records: the evaluations before and after, and whether it got worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.config import FinetuningSection, ModelSection, RunConfig
from strop.engine.ending import Ending, ending_of
from strop.engine.train_state import TrainState
from strop.errors import CheckpointError
from strop.significance import Change


def evaluation(step: int, loss: float | None) -> dict[str, Any]:
    return {"split": "eval", "step": step, "loss": loss, "rewards/accuracies": 0.5}


def ending(*records: dict[str, Any], state: TrainState | None = None, final: int = 10, **options: Any) -> Ending:
    config = RunConfig(models=(ModelSection(huggingface_id="m"),), finetuning=FinetuningSection(**options))
    return Ending.of(config, state or TrainState(step=10), num_steps=10, final_step=final, records=records)


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [(3.99, 10.9, True), (3.99, 3.5, False), (0.6931, 0.69311, False), (0.6931, 0.6934, True), (1.0, None, True)],
)
def test_a_model_that_got_worse_is_said(before: float, after: float | None, worse: bool) -> None:
    end = ending(evaluation(0, before), evaluation(5, 0.1), evaluation(10, after))
    assert end.worse is worse
    first, second = end.lines()
    assert first == "all 10 steps are done"
    assert f"{before:.4f}".rstrip("0") in second or after is None
    warning = end.warning()
    assert (warning is not None) is worse
    if warning is not None:
        assert "learning_rate" in warning


def test_the_evaluation_after_is_the_one_of_the_final_model() -> None:
    records = [evaluation(0, 1.0), evaluation(5, 0.5), evaluation(10, 2.0)]
    assert ending(*records, final=5).worse is False
    assert ending(*records, final=10).worse is True
    assert "step 5: loss 1.0000 -> 0.5000" in list(ending(*records, final=5).lines())[1]


def test_without_an_evaluation_before_or_any_nothing_is_compared() -> None:
    alone = ending(evaluation(10, 0.5))
    assert alone.worse is None and alone.warning() is None
    assert "step 10: loss 0.5000" in list(alone.lines())[1]
    assert list(ending().lines()) == ["all 10 steps are done"]


def test_early_stopping_is_told_with_its_numbers() -> None:
    state = TrainState(step=6, best_value=0.65, best_step=3, stale_evals=3)
    end = ending(evaluation(0, 0.7), evaluation(3, 0.65), state=state, final=3, early_stopping_patience=3)
    assert end.early and end.reason == next(end.lines())
    for piece in ("stopped early after step 6 of 10", "3 evaluations", "eval_loss", "0.6500 at step 3"):
        assert piece in end.reason
    assert not ending(state=TrainState(step=10, stale_evals=3), early_stopping_patience=3).early  # the plan's end


def test_it_comes_back_from_the_run_folder(tmp_path: Path) -> None:
    end = ending(evaluation(0, 1.0), evaluation(10, 2.0))
    (tmp_path / "result.json").write_text(json.dumps(end.as_dict()))
    assert ending_of(tmp_path) == end
    for text in ("{", "{}", "[]"):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(CheckpointError, match="how it ended cannot be read"):
            ending_of(tmp_path)


def test_a_loss_that_rose_by_chance_is_no_worse_model() -> None:
    records = [evaluation(0, 0.6931), evaluation(10, 0.70)]
    config = RunConfig(models=(ModelSection(huggingface_id="m"),))
    for half, worse in ((0.02, False), (0.001, True)):
        parts = {"num_steps": 10, "final_step": 10, "records": records}
        end = Ending.of(config, TrainState(step=10), **parts, change=Change(0.0069, half))
        assert end.worse is worse


def test_of_many_rows_a_sample_that_rose_is_no_worse_model() -> None:
    """The interval is that of the mean over all rows, which are in the records."""
    records = [evaluation(0, 0.6931), evaluation(10, 0.6935)]
    config = RunConfig(models=(ModelSection(huggingface_id="m"),))
    parts = {"num_steps": 10, "final_step": 10, "records": records}
    assert Ending.of(config, TrainState(step=10), **parts, change=Change(0.02, 0.001)).worse is False
