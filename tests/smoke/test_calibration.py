"""Findings on real runs of a tiny model: healthy ones raise no `fail`, broken ones the right finding first.

A share of `python -m benchmarks.findings`; all of it is a nightly test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.findings import BEGIN, PAGE, Scenario, outcome, scenarios, trained, write_models

SHARE = (
    "healthy dpo",
    "a rate far too high",
    "chosen and rejected exchanged in training",
    "another reference than the model at the start",
)
"""Names of the runs that the suite makes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("findings")
    write_models(folder)
    return folder


def check(scenario: Scenario, models: Path, seed: int) -> None:
    found = outcome(scenario, trained(scenario, models, seed))
    assert found.is_right, (scenario.name, found.told)


@pytest.mark.parametrize("name", SHARE)
def test_findings_are_right(name: str, models: Path) -> None:
    (scenario,) = (s for s in scenarios() if s.name == name)
    check(scenario, models, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("scenario", scenarios(), ids=lambda s: s.name)
def test_findings_are_right_with_other_rows(scenario: Scenario, seed: int, models: Path) -> None:
    check(scenario, models, seed)


def test_the_page_has_every_run_that_is_made() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2]
    assert [s.name for s in scenarios() if f"| {s.name} |" not in table] == []
    assert "**wrong**" not in table
