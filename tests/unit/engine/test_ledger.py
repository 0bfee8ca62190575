"""The ledger: what a line holds, and what the hash of a row depends on."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace

from strop.durable import to_json
from strop.engine.ledger import ledger_line, row_hash
from strop.types import Completion, Group, Origin

from .test_step_records import RECORD

GROUP = Group(
    array("i", [1, 2, 3]),
    (Completion(array("i", [4, 5]), b"\1\1"), Completion(array("i", [6]), b"\1")),
    Origin("rows.jsonl", 7),
    label=True,
    numbers={"rewards": array("d", [0.5, 1.0])},
)


def test_a_line_keeps_every_digit() -> None:
    record = replace(RECORD, loss=0.1 + 0.2, grad_norm=1 / 3, rows=("ab", "cd", "ef"), budget_tokens=64)
    line = json.loads(to_json(ledger_line(record)))
    assert (line["loss"], line["grad_norm"]) == (0.1 + 0.2, 1 / 3)
    assert (line["step"], line["rows"], line["cut"], line["seed"]) == (3, ["ab", "cd", "ef"], [[0, 2], [1]], [7, 3])
    assert (line["budget_tokens"], line["scored_tokens"], line["weights"]) == (64, 20, "00")


def test_the_hash_of_a_row_is_that_of_its_content() -> None:
    others = [
        replace(GROUP, prompt_ids=array("i", [1, 2])),
        replace(GROUP, completions=GROUP.completions[::-1]),
        replace(GROUP, completions=(Completion(array("i", [4, 5]), b"\1\0"), GROUP.completions[1])),
        replace(GROUP, completions=(Completion(array("i", [4]), b"\1"), Completion(array("i", [5, 6]), b"\1\1"))),
        replace(GROUP, label=False),
        replace(GROUP, label=None),
        replace(GROUP, numbers={"rewards": array("d", [0.5, 1.5])}),
        replace(GROUP, numbers={}),
    ]
    hashes = {row_hash(group) for group in (GROUP, *others)}
    assert len(hashes) == 1 + len(others)
    assert row_hash(replace(GROUP, origin=Origin("elsewhere.jsonl", 1), prompt_ids=array("q", [1, 2, 3]))) == row_hash(
        GROUP
    )
