"""Findings while a run goes on: told at once where they are certain, later where they need a course, each once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from strop.config.stop_on import AT_ONCE, AT_THE_END, OfTheCourse
from strop.report.diagnose import diagnose
from strop.report.watch import MOST_LINES, Watch

ROOT = Path(__file__).resolve().parents[3]


def watched(made: Any, stop_on: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """(id, step) of each finding, in the order in which they are raised."""
    lines, made.lines = made.lines, []
    watch = Watch(made.write(), stop_on)
    made.lines = lines
    return [(finding.id, line["step"]) for line in lines for finding in watch.line(line)]


def test_a_healthy_run_is_told_nothing_of(make: Callable[..., Any]) -> None:
    assert watched(make(), tuple(AT_ONCE)) == []


def test_what_is_certain_is_told_at_once(make: Callable[..., Any]) -> None:
    assert watched(make(lambda line: {"rewards/margins": 0.5} if line["step"] == 0 else {})) == [
        ("reference-mismatch", 0)
    ]
    made = make()
    made.train["findings"]["leaked_rows"] = 0
    made.eval["findings"] |= {"leaked_prompts": 900, "leaked_rows": 900}
    assert watched(made)[0] == ("leakage", 0)
    assert watched(make(lambda line: {"loss": None} if line["step"] == 34 else {})) == [("not-finite", 34)]


def test_what_needs_a_course_waits_for_one_and_is_told_once(make: Callable[..., Any]) -> None:
    rises = make(lambda line: {"loss": line["loss"] + 0.05 * line["step"]})
    told = watched(rises)
    assert [id_ for id_, _ in told].count("rate-high") == 1
    assert all(step >= 40 for _, step in told)  # 20 lines, every second step is logged
    warming = make(lambda line: {"loss": line["loss"] + 0.05 * line["step"], "learning_rate": 1e-9})
    assert watched(warming) == []


def test_a_resumed_run_is_looked_at_with_all_its_lines(make: Callable[..., Any]) -> None:
    rises = make(lambda line: {"loss": line["loss"] + 0.05 * line["step"]})
    lines, rises.lines = rises.lines, rises.lines[:-2]
    watch = Watch(rises.write())
    train = next(line for line in lines[-2:] if line["split"] == "train")
    assert "rate-high" in [finding.id for finding in watch.line(train)]
    table = watch._lines("train").table()
    assert table.step.tolist() == [line["step"] for line in lines if line["split"] == "train"]


def test_a_warning_counts_where_it_is_asked_for(make: Callable[..., Any]) -> None:
    displaced = make(
        lambda line: {"rewards/chosen": -0.6 * line["step"] / 100, "rewards/rejected": -2.0 * line["step"] / 100}
    )
    assert "likelihood-displacement" not in dict(watched(displaced))
    assert "likelihood-displacement" in dict(watched(displaced, ("likelihood-displacement",)))


def test_what_says_something_about_the_whole_run_is_not_told(make: Callable[..., Any]) -> None:
    still = make(
        lambda line: {"rewards/margins": 0.0, "rewards/accuracies": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0}
    )
    assert watched(still, tuple(AT_ONCE)) == []


def test_a_long_run_is_watched_in_little_memory_and_ever_more_rarely(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    line = next(x for x in made.lines if x["split"] == "train")
    made.lines, looks = [], []
    watch = Watch(made.write())
    monkeypatch.setattr("strop.report.watch.diagnose", lambda run: (looks.append(1), diagnose(run))[1])
    for step in range(1, 3 * MOST_LINES):
        watch.line({**line, "step": step})
    assert len(looks) < 100
    table = watch._lines("train").table()
    assert len(table) <= MOST_LINES and table.step[0] == 1 and table.step[-1] > 3 * MOST_LINES - 10
    assert all(len(column) == len(table) for column in table.columns.values())


def test_every_finding_either_stops_a_run_or_does_not() -> None:
    page = (ROOT / "docs/findings.md").read_text(encoding="utf-8").partition("## Thresholds")[0]
    listed = set(re.findall(r"^\| `([a-z-]+)` \|", page, re.M))
    assert listed - {"rows"} == AT_ONCE | AT_THE_END | set(get_args(OfTheCourse))


def test_the_numbers_of_each_reward_are_watched(make: Callable[..., Any]) -> None:
    """Also by a process that goes on with the run, whose earlier lines have them."""

    def change(line: dict[str, Any]) -> dict[str, Any]:
        done = line["step"] / 100
        won = {"reward": 0.7, "rewards/format/mean": 0.1 + 0.9 * done, "rewards/format/std": 0.4 * (1 - done)}
        return {**won, "rewards/right/mean": 0.6 - 0.5 * done, "rewards/right/std": 0.4}

    made = make(change)
    rewards = [{"name": name, "weight": 1.0} for name in ("format", "right")]
    made.settings |= {"post_training.method": "grpo", "rollout.enabled": True, "rewards": rewards}
    assert "one-reward-wins" in dict(watched(made, ("one-reward-wins",)))
    lines, made.lines = made.lines, made.lines[:-10]
    watch = Watch(made.write(), ("one-reward-wins",))
    told = [finding.id for line in lines[-10:] for finding in watch.line(line)]
    assert told == ["one-reward-wins"]
    columns = watch._lines("train").table().columns
    assert {len(values) for values in columns.values()} == {50}
