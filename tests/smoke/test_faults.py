"""Disks that fill up, libraries that raise what they like, processes that are stopped: no run is lost or taken for
another one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import strop
from strop import disk, durable, session, training
from strop.durable import JsonLines
from strop.engine import checkpoint_writer
from strop.engine.margins import MarginsLog
from strop.errors import CheckpointError, SaveError, StropError
from strop.policy.policy import Policy
from strop.rundir import TO_BE_REPLACED

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
PanicException = type("PanicException", (BaseException,), {})
"""As pyo3 has it: not an Exception."""


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture
def no_step(watched: pytest.MonkeyPatch) -> Callable[[], None]:
    """no_step(): from here on no forward pass with gradients is made."""
    return lambda: watched.setattr("strop.engine.gradients.forward_backward", fails(AssertionError("a step was taken")))


# ---- overwriting


@pytest.mark.share(1)
@pytest.mark.parametrize(
    "stop",
    [KeyboardInterrupt(), pytest.param(SystemExit(1), marks=pytest.mark.nightly), RuntimeError("a bug")],
    ids=repr,
)
def test_the_run_that_was_to_be_overwritten_is_not_the_result(
    stop: BaseException, runs: Any, watched: pytest.MonkeyPatch
) -> None:
    config = runs.config()
    (first,) = strop.train(config)
    old = runs.at(first.run_dir).final
    other = config.with_values({"training.learning_rate": 3e-3}, "the test")
    with watched.context() as patch, pytest.raises(type(stop)):
        patch.setattr(session, "prepare", fails(stop))
        strop.train(other, overwrite=True)
    (second,) = strop.train(other, resume="auto")
    new = runs.at(second.run_dir)
    assert not runs.same(new.final, old)
    assert new.steps() == [1, 2, 3, 4] and not (second.run_dir / TO_BE_REPLACED).exists()


def test_an_overwrite_that_is_refused_costs_nothing(runs: Any, watched: pytest.MonkeyPatch) -> None:
    config = runs.config()
    (first,) = strop.train(config)
    before = sorted(p.name for p in first.run_dir.iterdir())
    with watched.context() as patch, pytest.raises(StropError):
        patch.setattr(session, "prepare", fails(StropError("no such file")))
        strop.train(config, overwrite=True)
    assert sorted(p.name for p in first.run_dir.iterdir()) == before
    assert strop.train(config, resume="auto") == [first]


def test_a_checkpoint_of_a_run_that_is_to_be_overwritten_is_refused(runs: Any, watched: pytest.MonkeyPatch) -> None:
    config = runs.config()
    (first,) = strop.train(config)
    (first.run_dir / TO_BE_REPLACED).write_text("")
    with pytest.raises(CheckpointError, match="was going to be overwritten"):
        strop.train(config, resume=str(first.run_dir / "checkpoint-4"))


# ---- a run that is finished


def test_a_finished_run_is_compared_by_rows_and_weights(runs: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in runs.files["pairs"].read_text().splitlines()]
    file = tmp_path / "pairs.jsonl"

    def write() -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    model = tmp_path / "model"
    shutil.copytree(runs.files["model"], model)
    config = runs.config({"dataset.train_file": str(file), "models.0.huggingface_id": str(model)})
    (done,) = strop.train(config)
    rows[0]["chosen"] = "hello " * 5
    write()
    with pytest.raises(CheckpointError, match=r"the run is finished, with other .*\n.*data: "):
        strop.train(config, resume="auto")
    rows[0]["chosen"] = "yes "
    write()
    assert strop.train(config, resume="auto") == [done]
    shutil.copyfile(runs.files["other"] / "model.safetensors", model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the run is finished, with other .*\n.*models: "):
        strop.train(config, resume="auto")


@pytest.mark.nightly
def test_a_final_model_that_is_damaged_is_written_again_without_training(
    runs: Any, no_step: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    config = runs.config()
    (done,) = strop.train(config)
    whole = {p.name: p.read_bytes() for p in done.final.iterdir()}
    no_step()
    for name in sorted(whole):
        damaged = bytearray(whole[name])
        damaged[len(damaged) // 2] ^= 1
        (done.final / name).write_bytes(damaged)
        caplog.clear()
        strop.train(config, resume="auto")
        assert f"{name}: " in caplog.text and "is damaged" in caplog.text
        assert {p.name: p.read_bytes() for p in done.final.iterdir()} == whole
    shutil.rmtree(done.run_dir / "checkpoint-4")
    (done.final / name).unlink()
    with pytest.raises(CheckpointError, match=r"is damaged .*no checkpoint is left"):
        strop.train(config, resume="auto")


# ---- the final export


@pytest.mark.share(1)
@pytest.mark.parametrize(
    "error",
    [
        FULL,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        PanicException('called `Result::unwrap()` on an `Err` value: Os { code: 28, message: "No space left" }'),
        *(
            pytest.param(error, marks=pytest.mark.nightly)
            for error in (
                Exception("No space left on device (os error 28)"),
                RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 128 vs 22"),
                PermissionError(errno.EACCES, "Permission denied"),
            )
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_export_that_fails_is_taken_again_without_training(
    error: BaseException, runs: Any, watched: pytest.MonkeyPatch, no_step: Callable[[], None]
) -> None:
    unbroken, config = runs(fresh=False), runs.config()
    with watched.context() as patch:
        patch.setattr(Policy, "save_pretrained", fails(error))
        with pytest.raises(SaveError, match=r"the final model could not be written: .*\n.*--resume"):
            strop.train(config)
    no_step()
    (result,) = strop.train(config, resume="auto")
    assert runs.same_run(runs.at(result.run_dir), unbroken)
    assert not [p for p in result.run_dir.iterdir() if p.name.startswith(".tmp-")]


def test_an_extension_whose_export_fails_is_taken_again_without_training(
    runs: Any, watched: pytest.MonkeyPatch, no_step: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Its result.json is there by then, and the old model, too."""
    config = runs.config(max_steps=None, num_epochs=1)
    (short,) = strop.train(config)
    longer = config.with_values({"training.max_steps": short.step + 1}, "given")
    with watched.context() as patch:
        patch.setattr(Policy, "save_pretrained", fails(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(SaveError, match=r"the final model could not be written: .*\n.*--resume"):
            strop.train(longer, resume="auto")
    no_step()
    strop.train(config, resume="auto")
    assert f"result.json is of a course of {short.step + 1} steps, whose model could not be written" in caplog.text
    (long,) = strop.train(longer, resume="auto")
    assert (long.step, long.ending.final_step) == (short.step + 1, short.step + 1)


def test_a_disk_too_small_for_the_export_is_told_before_it(
    runs: Any, watched: pytest.MonkeyPatch, no_step: Callable[[], None]
) -> None:
    config = runs.config()
    with watched.context() as patch:
        patch.setattr(training, "check_space", lambda *_, **__: ())
        patch.setattr(checkpoint_writer, "ensure_space", lambda *_: None)
        patch.setattr(disk, "free_bytes", lambda path: 100)
        with pytest.raises(SaveError, match=r"the disk is too full: .* needed, 100 bytes free"):
            strop.train(config)
    no_step()
    strop.train(config, resume="auto")


def test_killed_in_the_export(runs: Any, watched: pytest.MonkeyPatch, no_step: Callable[[], None]) -> None:
    unbroken, config = runs(fresh=False), runs.config()
    with watched.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable, "sync_tree", fails(KeyboardInterrupt()))
        strop.train(config)
    no_step()
    (result,) = strop.train(config, resume="auto")
    assert runs.same_run(runs.at(result.run_dir), unbroken)


# ---- saves that fail on the way


class Failing:
    """Stands in for a function; its calls of these numbers, from 1, fail."""

    def __init__(self, real: Callable[..., Any], numbers: set[int], error: BaseException) -> None:
        self.real, self.numbers, self.error, self.count = real, numbers, error, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        if self.count in self.numbers:
            raise self.error
        return self.real(*arguments, **named)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("best", "numbers", "kept"),
    [
        (False, {1}, [2, 3, 4]),
        (False, {2, 3}, [1, 4]),
        (False, {4}, [1, 2, 3]),
        (False, {1, 2, 3, 4}, []),
        pytest.param(True, {1}, [2, 3, 4], marks=pytest.mark.nightly),
        (True, {2, 3}, [1, 4]),
        pytest.param(True, {4}, [1, 2, 3], marks=pytest.mark.nightly),
        (True, {1, 2, 3, 4}, []),
    ],
    ids=str,
)
def test_a_save_that_fails_does_not_end_a_run(
    best: bool, numbers: set[int], kept: list[int], runs: Any, watched: pytest.MonkeyPatch, capsys: Any
) -> None:
    keys = {"training.save_steps": 1, "training.save_total_limit": None, "finetuning.load_best_model_at_end": best}
    unbroken = runs(keys, fresh=False)
    failing = Failing(checkpoint_writer.write_tensor_files, numbers, FULL)
    watched.setattr(checkpoint_writer, "write_tensor_files", failing)
    run = runs(keys, fresh=True)
    assert run.checkpoints == kept and failing.count == 4
    told = capsys.readouterr().err
    assert all(f"step {n} could not be saved" in told for n in numbers)
    if not best:
        assert runs.same_run(run, unbroken)


def test_logs_that_cannot_be_written_do_not_end_a_run(runs: Any, watched: pytest.MonkeyPatch, capsys: Any) -> None:
    unbroken = runs(fresh=False)
    watched.setattr(JsonLines, "append", lambda_of(Failing(JsonLines.append, {2, 3, 5}, FULL)))
    watched.setattr(MarginsLog, "write", lambda_of(Failing(MarginsLog.write, {1, 3}, FULL)))
    run = runs(fresh=True)
    assert runs.same_run(run, unbroken)  # every record, in order
    assert (run.path / "ledger.jsonl").read_text() == (unbroken.path / "ledger.jsonl").read_text()
    assert len(run.margins) < 4
    told = capsys.readouterr().err
    assert (
        "a line of metrics.jsonl could not be written yet" in told and "the margins of step 1 cannot be written" in told
    )


def lambda_of(failing: Failing) -> Callable[..., Any]:
    """As a method."""
    return lambda *arguments, **named: failing(*arguments, **named)
