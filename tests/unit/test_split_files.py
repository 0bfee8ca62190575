"""Split files of `strop prepare` are all there and whole, or none of them is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.data.split_files import write_split_files
from strop.errors import DataError

ROWS = [{"prompt": f"q {i}", "completion": f"x {i}"} for i in range(20)]


def test_no_half_of_a_split_is_ever_there(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{\n")
    for at in range(1, 60):
        out = tmp_path / f"out-{at}"
        disk = on_disk(at, None, lambda out=out: write_split_files([str(path)], out, "single"))
        there = sorted(p.name for p in out.iterdir()) if out.exists() else []
        assert there in ([], ["rejected.jsonl", "statistics.json", "train.jsonl", "val.jsonl"])
        if there:
            splits = [(out / name).read_text().splitlines() for name in ("train.jsonl", "val.jsonl")]
            assert len(list(map(json.loads, splits[0] + splits[1]))) == len(ROWS)
        if not disk.dead:
            assert there
            return
    raise AssertionError("the last call was never reached")


def test_a_full_disk_leaves_nothing(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    full = OSError(28, "No space left on device")
    with pytest.raises(DataError, match="No space left"):
        on_disk(3, full, lambda: write_split_files([str(path)], tmp_path / "out", "single"))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_prompt_as_text_and_as_a_message_is_one_prompt(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "other"}]}
        for i in range(21)
    ]
    for name, rows in (("a", ROWS), ("b", talks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs, others = [str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")]
    found = write_split_files(inputs, tmp_path / "out", "single", val_inputs=others)
    assert (found.leaks, found.splits["val.jsonl"]["rows"]) == (20, 1)
