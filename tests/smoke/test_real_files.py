"""The real files load as they are: the command's counts beside those of a few lines of plain Python."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from strop import cli

large = pytest.mark.nightly


def hh_is_good(row: dict[str, str]) -> bool:
    """By the words on the format: turns in turns, none empty, one prompt, two answers."""
    sides = []
    for side in ("chosen", "rejected"):
        pieces = re.split(r"\n\n(Human|Assistant):", row[side])
        names, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
        if pieces[0] or names != ["Human", "Assistant"] * (len(names) // 2) or not all(texts):
            return False
        sides.append(texts)
    return sides[0][:-1] == sides[1][:-1] and sides[0][-1] != sides[1][-1]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


CASES = [
    ("hh_raw.train", "dpo", []),
    pytest.param("hh_helpful.train", "dpo", [], marks=large),
    ("hh_helpful.val", "dpo", []),
    pytest.param("pref_mix.train", "dpo", [], marks=large),
    ("pref_mix.val", "dpo", []),
    pytest.param("kto_unpaired.train", "kto", [], marks=large),
    ("hh_helpful.val", "kto", []),
    ("sft_toolcalls.train", "sft", ["--template", "qwen2.5_instruct"]),
    pytest.param("gsm8k.train", "sft", ["--completion-column", "answer"], marks=large),
    ("gsm8k.test", "sft", ["--completion-column", "answer"]),
    pytest.param("instruct_sft.train", "sft", [], marks=large),
    ("instruct_sft.val", "sft", []),
]


@pytest.mark.share(1)
@pytest.mark.parametrize(("name", "method", "flags"), CASES)
def test_a_real_file_loads(
    name: str, method: str, flags: list[str], shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared / "data" / f"{name}.jsonl"
    rows = rows_of(path)
    good = [row for row in rows if not name.startswith("hh_raw") or hh_is_good(row)]
    config = tmp_path / "c.yaml"
    keys = {
        "models": [{"huggingface_id": str(shared / "models" / "base-12m")}],
        "dataset": {"train_file": str(path), "validation_split": 0, "on_error": "skip", "max_dropped_fraction": 0.05},
        "post_training": {"method": method},
        "training": {"max_seq_length": 8192, "max_prompt_length": None, "max_completion_length": None},
    }
    config.write_text(json.dumps(keys))
    assert cli.main(["train", "--config", str(config), *flags, "--dry-run", "--no-time"]) == 0
    shown = capsys.readouterr().out
    assert f"train: {len(good):,} of {len(rows):,} rows" in shown, shown
    # the same rows by the other road, into split files
    out = tmp_path / "splits"
    columns = [flag for flag in flags if flag in ("--completion-column", "answer")]
    arguments = ["--input", str(path), "--output-dir", str(out), "--method", method, "--keep-duplicates", *columns]
    assert cli.main(["prepare", *arguments]) == 0
    written = [row for file in out.glob("*.jsonl") if file.name != "rejected.jsonl" for row in rows_of(file)]
    key = Counter(json.dumps(row, sort_keys=True) for row in good)
    assert Counter(json.dumps(row, sort_keys=True) for row in written) == key
    rejected = rows_of(out / "rejected.jsonl") if len(good) < len(rows) else []
    bad = [number for number, row in enumerate(rows, start=1) if name.startswith("hh_raw") and not hh_is_good(row)]
    assert [row["line"] for row in rejected] == bad


@pytest.mark.nightly
def test_a_template_without_tools_names_one_that_has_them(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    rows = {"train_file": str(shared / "data" / "sft_toolcalls.train.jsonl"), "on_error": "skip"}
    config.write_text(
        json.dumps({"models": [{"huggingface_id": str(shared / "models" / "base-12m")}], "dataset": rows})
    )
    assert cli.main(["train", "--config", str(config), "--dry-run", "--no-time"]) == 1
    words = capsys.readouterr().err
    assert "of 300 rows are lost" in words and "dropped_by_template" in words and "qwen2.5_instruct" in words
