"""Charts show each step once, and a tracker that fails takes nothing with it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from strop.engine.trackers import Trackers, open_trackers


def record(step: int, split: str = "train", **metrics: object) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "split": split, "loss": 1 / step, "rewards/margins": step / 2, **metrics}


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def series(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, pytest.approx(e.value)) for e in read(folder).Scalars(tag)]


def test_numbers_go_under_their_split(tmp_path: Path) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path, config="seed: 1\ntoken: hf_" + "a1B2c3D4e5" * 3)
    trackers.log(record(1))
    trackers.log(record(2, peak_memory_gib=None, note="text", flag=True, num_groups=3))
    trackers.log(record(2, "eval"))
    trackers.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/epoch", "train/rewards/margins", "train/num_groups",
        "eval/loss", "eval/epoch", "eval/rewards/margins",
    }  # fmt: skip
    assert series(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert series(tmp_path, "eval/rewards/margins") == [(2, 1.0)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 1" in text and "hf_" not in text


def test_a_resume_shows_each_step_once_and_the_later_value(tmp_path: Path) -> None:
    first = open_trackers(["tensorboard"], tmp_path)
    for step in range(1, 9):
        first.log(record(step))
    first.close()
    second = open_trackers(["tensorboard"], tmp_path, resumed_at=5)
    for step in range(6, 12):
        second.log(record(step, **{"rewards/margins": -1.0}))
    second.close()
    assert series(tmp_path, "train/loss") == [(s, 1 / s) for s in range(1, 12)]
    assert [v for _, v in series(tmp_path, "train/rewards/margins")] == [s / 2 for s in range(1, 6)] + [-1.0] * 6


def test_no_trackers_is_fine(tmp_path: Path) -> None:
    trackers = open_trackers([], tmp_path)
    trackers.log(record(1))
    trackers.close()
    assert list(tmp_path.iterdir()) == []


class Failing:
    def __init__(self, error: Exception, close_error: Exception | None = None) -> None:
        self.error, self.close_error = error, close_error
        self.calls = 0
        self.closed = 0

    def log(self, record: Mapping[str, Any]) -> None:
        self.calls += 1
        raise self.error

    def close(self) -> None:
        self.closed += 1
        if self.close_error:
            raise self.close_error


class Good:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = 0

    def log(self, record: Mapping[str, Any]) -> None:
        self.steps.append(record["step"])

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), ConnectionResetError("gone"), RuntimeError("died"), ValueError("x")],
)
def test_a_failing_tracker_is_said_once_and_left_out(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    bad, good = Failing(error, OSError("again")), Good()
    trackers = Trackers({"bad": bad, "good": good})
    for step in (1, 2, 3):
        trackers.log(record(step))
    trackers.close()
    assert (bad.calls, bad.closed, good.steps, good.closed) == (1, 1, [1, 2, 3], 1)
    assert len([r for r in caplog.records if "gets no more records" in r.message]) == 1


def test_a_bug_in_a_tracker_shows() -> None:
    with pytest.raises(KeyError):
        Trackers({"buggy": Failing(KeyError("typo"))}).log(record(1))


def test_a_folder_that_cannot_be_made_costs_only_the_charts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    trackers = open_trackers(["tensorboard"], tmp_path)
    trackers.log(record(1))
    trackers.close()
    assert "could not be started" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_disk_that_fills_up_costs_only_the_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path)
    trackers.log(record(1))

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 100):
        trackers.log(record(step))
    trackers.close()
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(10)  # its death is reported in this test, not in the next one
    assert len([r for r in caplog.records if "No space left" in r.message]) == 1


def test_what_was_logged_before_a_kill_is_on_disk(tmp_path: Path) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path)
    for step in range(1, 40):
        trackers.log(record(step))
    assert len(series(tmp_path, "train/loss")) == 39  # read before the close
    trackers.close()
