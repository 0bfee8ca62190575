"""The disk is looked at before the model is loaded: a run that could not end is refused, one that runs short warned."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from strop import disk, session
from strop.config import of_model, resolve
from strop.disk_estimate import Space
from strop.dryrun import dry_run
from strop.errors import SaveError
from strop.policy.precision import Precision
from strop.prepared import Prepared, prepare


def prepared_of(config: Any) -> Prepared:
    config = resolve(config)
    return prepare(of_model(config, config.models[0]), config.models[0])


def space_of(config: Any, steps_done: int = 0) -> Space:
    return Space.of(prepared_of(config), Precision(torch.float32), steps_done)


def size(folder: Path, suffix: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(f"*{suffix}") if file.is_file())


@pytest.mark.share(1)
@pytest.mark.parametrize(
    "keys",
    [{"lora.enabled": True, "lora.r": 8}, {}, {"save_dtype": "bfloat16"}, {"method": "orpo"}],
    ids=["lora", "full", "full-bf16", "no-reference"],
)
def test_what_is_predicted_is_what_is_written(keys: dict[str, Any], runs: Any) -> None:
    run, space = runs(keys, save_steps=2), space_of(runs.config(keys, save_steps=2))
    (newest, *_) = sorted(run.path.glob("checkpoint-*"), reverse=True)
    assert space.checkpoint == pytest.approx(size(newest, ""), rel=0.1, abs=40_000)
    assert space.final == pytest.approx(size(run.path / "final", ".safetensors"), rel=0.1, abs=5_000)
    assert (space.reference == 0) is (keys.get("method") == "orpo")


def test_as_many_checkpoints_as_lie_there_at_once(runs: Any) -> None:
    def most(steps_done: int = 0, **keys: Any) -> int:
        return space_of(runs.config(load_best_model_at_end=False, max_steps=8, **keys), steps_done).most

    assert most(save_steps=8) == 1
    assert most(save_steps=2, save_total_limit=1) == 2  # a new one, and the one before it
    assert most(save_steps=2, save_total_limit=3) == 4
    assert most(save_steps=2, save_total_limit=None) == 4
    assert most(save_steps=2, save_total_limit=None, steps_done=6) == 1
    assert most(save_steps=2, steps_done=8) == 0


@pytest.fixture
def not_loaded(watched: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    watched.setattr(session, "build_policy", loaded)


def test_a_run_that_could_not_end_is_refused_before_the_model_is_loaded(
    runs: Any, watched: pytest.MonkeyPatch, not_loaded: None
) -> None:
    config = runs.config()
    least = space_of(config).least
    watched.setattr(disk, "free_bytes", lambda path: least - 1)
    with pytest.raises(SaveError, match=r"too full for this run to end: .* needed at least, .* free"):
        strop.train(config)


def test_what_is_replaced_makes_room(runs: Any, watched: pytest.MonkeyPatch) -> None:
    config = runs.config(save_steps=2)
    strop.train(config)
    least = space_of(config).least
    free: Callable[[Path], int] = lambda path: least - 1  # noqa: E731
    with watched.context() as patch:
        patch.setattr(disk, "free_bytes", free)
        with pytest.raises(SaveError):
            strop.train(replace_output(config, runs))
        strop.train(config, overwrite=True)


def replace_output(config: Any, runs: Any) -> Any:
    return config.with_values({"training.output_dir": str(runs.new_folder())}, "test")


def test_a_disk_that_will_be_full_is_warned_of(
    runs: Any, watched: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = runs.config(save_steps=1)
    space = space_of(config)
    assert space.least < replace(space, most=2).peak < space.peak
    with watched.context() as patch, caplog.at_level(logging.WARNING, "strop"):
        patch.setattr(disk, "free_bytes", lambda path: space.peak - 1)
        strop.train(config)
    assert "the disk will be full" in caplog.text and "save_total_limit" in caplog.text


OTHER_DISKS = {
    "mount": ("mount_dir", "copying fails at the end of the run"),
    "cache": ("STROP_CACHE", "later runs score it again"),
}


@pytest.mark.parametrize("full", OTHER_DISKS)
@pytest.mark.parametrize("same_disk", [True, False])
def test_the_disks_of_the_mirror_and_of_the_cache_are_looked_at(
    full: str,
    same_disk: bool,
    runs: Any,
    watched: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    watched.setenv("STROP_CACHE", str(tmp_path / "cache"))
    keys = {"training.mount_dir": str(tmp_path / "mount"), "training.reference_store": True}
    config = runs.config(keys, save_steps=8)
    space = space_of(config)

    def disk_of(path: Path) -> str:
        return next((name for name in OTHER_DISKS if (tmp_path / name) in (path, *path.parents)), "run")

    watched.setattr(disk, "device_of", lambda path: 0 if same_disk else disk_of(path))
    room = 10**12 if not same_disk else space.peak
    watched.setattr(disk, "free_bytes", lambda path: 10 if not same_disk and disk_of(path) == full else room)
    dry_run(config, timed=False)
    told = [line for line in capsys.readouterr().out.splitlines() if "the disk will be full" in line]
    (line,) = told
    if same_disk:  # the run itself fits, with what lies elsewhere it does not
        assert "the copy of the final model of" in line and "what the cache keeps of the reference of" in line
    else:
        assert all(words in line for words in OTHER_DISKS[full]) and "10 bytes free" in line


def test_a_dry_run_says_that_the_disk_is_too_full(
    runs: Any, watched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.config()
    watched.setattr(disk, "free_bytes", lambda path: 10)
    dry_run(config, timed=False)
    shown = capsys.readouterr().out
    assert "note: this would stop a run here: " in shown and "too full for this run to end" in shown
