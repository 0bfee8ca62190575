"""A summary line and an array a step, with the numbers that the definition gives, each step once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from strop.engine.margins import MarginsLog


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "margins_log.jsonl").read_text().splitlines()]


def write_steps(log: MarginsLog, first: int, last: int, per_epoch: int = 4) -> None:
    for step in range(first, last + 1):
        epoch, inside = divmod(step - 1, per_epoch)
        log.write(epoch, inside, step, np.arange(3.0) + step)
    log.close()


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_summary_is_of_the_array_beside_it(tmp_path: Path, count: int) -> None:
    margins = np.random.default_rng(count).normal(size=count) * 10
    MarginsLog(tmp_path).write(2, 13, 45, margins)
    (line,) = lines(tmp_path)
    array = np.load(tmp_path / "epoch_002" / "step_00013.npy", allow_pickle=False)
    assert array.dtype == np.float32 and np.array_equal(array, margins.astype(np.float32))
    assert (line["epoch"], line["step"], line["global_step"], line["batch_size"]) == (2, 13, 45, count)
    assert line["npy"] == "epoch_002/step_00013.npy"
    wide = sorted(array.astype(np.float64).tolist())
    mean = sum(wide) / count
    assert line["mean"] == pytest.approx(mean)
    assert line["std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in wide) / count), abs=1e-12)
    assert (line["min"], line["max"]) == (wide[0], wide[-1])
    assert line["median"] == pytest.approx((wide[(count - 1) // 2] + wide[count // 2]) / 2)
    for name, share in (("p10", 0.1), ("p90", 0.9)):
        place = share * (count - 1)
        low = wide[int(place)]
        high = wide[min(int(place) + 1, count - 1)]
        assert line[name] == pytest.approx(low + (place - int(place)) * (high - low))
    assert line["pos_frac"] == sum(v > 0 for v in wide) / count
    assert line["sample"] == array[:8].astype(np.float64).tolist()


def test_the_fields_are_those_that_readers_know(tmp_path: Path) -> None:
    MarginsLog(tmp_path).write(0, 0, 1, torch.tensor([0.0, 1.0]).numpy())
    assert list(lines(tmp_path)[0]) == [
        "epoch", "step", "global_step", "batch_size", "mean", "std", "min", "p10", "median", "p90", "max", "pos_frac",
        "sample", "npy",
    ]  # fmt: skip
    assert lines(tmp_path)[0]["pos_frac"] == 0.5  # zero is not positive


def test_after_a_cut_every_step_stands_there_once(tmp_path: Path) -> None:
    write_steps(MarginsLog(tmp_path), 1, 10)
    unbroken = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with (tmp_path / "margins_log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')  # killed here, with the array of the line written already
    np.save(tmp_path / "epoch_002" / "step_00002.npy", np.zeros(3, dtype=np.float32))
    log = MarginsLog(tmp_path)
    log.rewind(6)
    assert [line["global_step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert len(list(tmp_path.rglob("*.npy"))) == 6
    write_steps(log, 7, 10)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == unbroken
    log.rewind(0)
    assert lines(tmp_path) == [] and list(tmp_path.rglob("*.npy")) == []


def test_other_peoples_arrays_stay(tmp_path: Path) -> None:
    write_steps(MarginsLog(tmp_path), 1, 2)
    (tmp_path / "mine.npy").write_bytes(b"precious")
    MarginsLog(tmp_path).rewind(0)
    assert (tmp_path / "mine.npy").exists()


def test_cutting_what_is_not_there_is_fine(tmp_path: Path) -> None:
    MarginsLog(tmp_path / "absent").rewind(3)
    assert not (tmp_path / "absent").exists()


def test_margins_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    MarginsLog(tmp_path).write(0, 0, 1, np.array([math.nan, 1.0]))
    (line,) = lines(tmp_path)
    assert line["mean"] is None and line["sample"] == [None, 1.0] and line["pos_frac"] == 0.5


def test_arrays_stay_where_the_log_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MarginsLog(tmp_path)
    for step in range(4):
        log.write(0, step, step + 1, np.ones(3))
    log.close()
    file = tmp_path / "margins_log.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "{" + lines[1][5:] + lines[2] + lines[3])
    log.rewind(3)
    kept = {p.name for p in tmp_path.glob("epoch_000/*")}
    assert kept == {"step_00000.npy", "step_00001.npy", "step_00002.npy"}
    assert (tmp_path / ".bad-margins_log.jsonl").exists() and "1 lines are damaged" in caplog.text
