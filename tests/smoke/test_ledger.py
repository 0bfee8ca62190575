"""ledger.jsonl of real runs: every step once, in a resumed run as in an unbroken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import strop


def ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]


def test_every_step_has_its_line_whatever_is_logged(runs: Any) -> None:
    run = runs(max_steps=5, logging_steps=3)
    lines = ledger(run.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert len({line["weights"] for line in lines}) == 5
    rows = [row for line in lines[:3] for row in line["rows"]]
    assert len(rows) == len(set(rows)) == 12  # an epoch has every row once
    assert set(lines[3]["rows"]) <= set(rows)
    assert all(sorted(place for part in line["cut"] for place in part) == [0, 1, 2, 3] for line in lines)


@pytest.mark.nightly
def test_a_resumed_run_has_the_ledger_of_an_unbroken_one(runs: Any) -> None:
    keys = {"lora.lora_dropout": 0.2, "training.save_steps": 2, "training.logging_steps": 2}
    run = runs(keys, max_steps=5, fresh=True)
    unbroken = ledger(run.path)
    with (run.path / "ledger.jsonl").open("a") as file:
        file.write('{"step": 6, "ro')  # the process died in the middle of a line
    (run.path / "final").rename(run.path / "earlier")
    config = runs.config(keys, max_steps=5, output_dir=str(run.path.parent))
    strop.train(config, resume=str(run.path / "checkpoint-2"))
    assert ledger(run.path) == unbroken
