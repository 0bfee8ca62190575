"""TensorBoard's files, where the disk does not take them."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from strop.trackers import fan_out
from strop.trackers.fan_out import Trackers
from strop.trackers.tensorboard import TensorBoard
from strop.trackers.tracker import RunFacts

STEPS = 5


@pytest.mark.parametrize("fails_at", range(STEPS + 1))  # 0: where it is started
def test_a_disk_that_fills_is_told_once_and_what_was_missed_follows(
    fails_at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fan_out, "FIRST_PAUSE", 0.0)
    write, full = RecordWriter.write, fails_at == 0

    def fill(self: RecordWriter, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fill)
    trackers = Trackers({"tensorboard": lambda: TensorBoard(RunFacts("run", tmp_path))})
    for step in range(1, STEPS + 1):
        full = step == fails_at
        trackers.log({"step": step, "split": "train", "loss": 1 / step})
    full = False
    trackers.close("finished")
    time.sleep(0.1)  # a thread that died may yet print

    assert capfd.readouterr().err == ""
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert ["No space left on device" in text for text in warnings] == [True, False]
    assert warnings[1] == "tensorboard failed 1 times, and has all records in the end"
    events: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, STEPS + 1)]
