"""A tracker that fails takes nothing with it, and gets what it missed if it comes back."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from strop.errors import CheckpointError
from strop.trackers import fan_out
from strop.trackers.fan_out import Trackers
from strop.trackers.tracker import Ended, Table


def record(step: int, split: str = "train", **metrics: object) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "split": split, "loss": 1 / step, **metrics}


class Fake:
    """Fails while `errors` has any, one for each call; then takes records."""

    knows = False

    def __init__(self, *errors: Exception, close_error: Exception | None = None) -> None:
        self.errors, self.close_error = list(errors), close_error
        self.identity: Mapping[str, str] = {"id": "x"}
        self.taken: list[Mapping[str, Any]] = []
        self.calls = 0
        self.ended: list[str] = []

    def log(self, record: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(record)

    def close(self, ended: Ended) -> None:
        self.ended.append(ended)
        if self.close_error:
            raise self.close_error

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        self.log({"step": step, "lines": lines})

    def report(self, step: int, tables: Sequence[Table]) -> None:
        self.log({"step": step, "tables": [table.name for table in tables]})

    @property
    def steps(self) -> list[int]:
        return [taken["step"] for taken in self.taken]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that trackers see, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(fan_out.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), ConnectionResetError("gone"), RuntimeError("died"), KeyError("a bug")],
)
def test_a_tracker_that_never_works_is_told_once(
    caplog: pytest.LogCaptureFixture, clock: list[float], error: Exception
) -> None:
    bad, good = Fake(*[error] * 99, close_error=error), Fake()
    trackers = Trackers({"bad": lambda: bad, "good": lambda: good})
    for step in range(1, 101):
        clock[0] += 10
        trackers.log(record(step))
    trackers.close("finished")
    assert good.steps == list(range(1, 101)) and good.ended == ["finished"]
    assert 1 < bad.calls < 10  # it is not asked at every record
    said = [r.message for r in caplog.records]
    assert len([m for m in said if "The run goes on" in m]) == 1
    assert f"bad failed {bad.calls} times; the last 100 records are missing there" in said


def test_what_failed_is_offered_again_in_order(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    shaky = Fake(OSError("gone"), OSError("gone"))
    trackers = Trackers({"shaky": lambda: shaky})
    for step in range(1, 30):
        clock[0] += 10
        trackers.log(record(step))
    trackers.close("stopped")
    assert shaky.steps == list(range(1, 30)) and shaky.ended == ["stopped"]
    assert "shaky failed 2 times, and has all records in the end" in caplog.text


def test_a_tracker_may_start_late(clock: list[float]) -> None:
    tracker, refusals, kept = Fake(), [OSError("no server"), OSError("no server")], []

    def start() -> Fake:
        if refusals:
            raise refusals.pop()
        return tracker

    trackers = Trackers({"late": start}, kept.append)
    assert kept == []
    for step in range(1, 30):
        clock[0] += 10
        trackers.log(record(step))
    trackers.close("finished")
    assert tracker.steps == list(range(1, 30)) and kept == [{"late": {"id": "x"}}]


def test_one_that_cannot_start_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def start() -> Fake:
        raise RuntimeError("no server at http://me:hunter2-hunter2@host/")

    trackers = Trackers({"none": start})
    trackers.log(record(1))
    trackers.close("failed")
    assert "none could not be started" in caplog.text and "hunter2" not in caplog.text


def test_only_numbers_are_handed_on() -> None:
    good = Fake()
    trackers = Trackers({"good": lambda: good})
    trackers.log(record(2, peak_memory_gib=None, note="text", flag=True, num_groups=3))
    assert good.taken == [{"step": 2, "epoch": 0.2, "split": "train", "loss": 0.5, "num_groups": 3}]


def test_only_who_knows_what_it_holds_is_told_of_the_past() -> None:
    knowing, other = Fake(), Fake()
    knowing.knows = True
    trackers = Trackers({"knowing": lambda: knowing, "other": lambda: other})
    trackers.catch_up([record(1), record(2)])
    trackers.log(record(3))
    assert knowing.steps == [1, 2, 3] and other.steps == [3]


def test_samples_and_the_report_keep_their_place(clock: list[float]) -> None:
    shaky = Fake(OSError("gone"))
    trackers = Trackers({"shaky": lambda: shaky})
    trackers.log(record(1))
    trackers.show(1, [{"prompt": "a"}])
    trackers.log(record(2))
    trackers.report(2, [Table("verdict", ("verdict",), [("fine",)])])
    trackers.close("finished")
    assert shaky.steps == [1, 1, 2, 2] and shaky.taken[1]["lines"] == [{"prompt": "a"}]
    assert shaky.taken[3]["tables"] == ["verdict"]


def test_no_trackers_is_fine() -> None:
    trackers = Trackers({})
    trackers.catch_up([record(1)])
    trackers.log(record(1))
    trackers.close("finished")


def test_a_disk_without_room_for_what_trackers_go_on_with_stops_nothing(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Mapping[str, Mapping[str, str]]] = []
    is_full = [True]

    def keep(found: Mapping[str, Mapping[str, str]]) -> None:
        if is_full[0]:
            raise CheckpointError("cannot be written: No space left on device")
        kept.append(found)

    fake = Fake()
    trackers = Trackers({"fake": lambda: fake}, keep)
    trackers.log(record(1))
    assert fake.steps == [1] and not kept
    assert caplog.text.count("could not be written yet") == 1
    is_full[0] = False
    trackers.log(record(2))
    trackers.log(record(3))
    assert kept == [{"fake": {"id": "x"}}]
