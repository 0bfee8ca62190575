"""Findings on real runs of a tiny model: healthy ones raise no `fail`, broken ones the right finding first.

A share of `python -m benchmarks.findings`; all of it is a nightly test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks.findings import BEGIN, END, PAGE, Outcome, outcome, written
from benchmarks.scenarios import UNTRIED, Scenario, scenarios, trained, write_models

from strop.config.methods import METHODS

SHARE = ("healthy dpo", "chosen and rejected exchanged in training")
"""Names of the runs that the suite makes. Single findings are tried on folders made in code
(tests/unit/report/test_findings.py), which takes milliseconds each."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("findings")
    write_models(folder)
    return folder


def check(scenario: Scenario, models: Path, seed: int) -> None:
    found = outcome(scenario, trained(scenario, models, seed))
    assert found.is_right, (scenario.name, found.raised)


@pytest.mark.share(1)
@pytest.mark.parametrize("name", SHARE)
def test_findings_are_right(name: str, models: Path) -> None:
    (scenario,) = (s for s in scenarios() if s.name == name)
    check(scenario, models, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("scenario", scenarios(), ids=lambda s: s.name)
def test_findings_are_right_with_other_rows(scenario: Scenario, seed: int, models: Path) -> None:
    check(scenario, models, seed)


def test_some_rows_of_the_page_are_written_and_the_others_stay() -> None:
    first, second, *_ = scenarios()
    raised = [[Outcome(first, []), Outcome(first, [])], [Outcome(second, []), Outcome(second, [("drift", "fail")])]]
    page = written(f"before\n{BEGIN}\n\n{END}\nafter\n", raised)
    assert "1 of 2 are right." in page and page.startswith("before") and page.endswith("after\n")
    assert "| right with 2 seeds |" in page and "| nothing; but: drift (fail) | **wrong** with 1 of 2 |" in page
    again = written(page, [[Outcome(second, [])]])
    assert f"| {first.name} |" in again and "drift" not in again and "2 of 2 are right." in again


def test_the_page_has_every_run_that_is_made() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2]
    assert [s.name for s in scenarios() if f"| {s.name} |" not in table] == []
    assert "**wrong**" not in table


def test_a_run_is_broken_for_every_finding_and_healthy_for_every_method() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("## Each finding")[0]
    findings = set(re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE))
    provoked = {s.first for s in scenarios() if s.first}
    assert findings == provoked | set(UNTRIED) and not provoked & set(UNTRIED)
    assert {s.method for s in scenarios() if not s.first} == set(METHODS)
