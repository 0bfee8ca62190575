"""`strop compare`: ten runs that differ from one run by something that was planted, and each is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from strop.cli.entry import main
from strop.report.compare import Parting, compare

KEYS: Mapping[str, Any] = {
    "training.max_steps": 4,
    "dataset.validation_split": 0.0,
    "training.weight_decay": 0.1,
    "training.save_steps": 100,
}
PLANTED: Mapping[str, tuple[Mapping[str, Any], int, str, str]] = {
    "another learning rate": ({"training.learning_rate": 1e-3}, 1, "settings", "training.learning_rate"),
    "another beta": ({"post_training.beta": 0.3}, 1, "settings", "post_training.beta: 0.1 and 0.3"),
    "another decay": ({"training.weight_decay": 0.0}, 2, "settings", "training.weight_decay: 0.1 and 0"),
    "another rank": ({"lora.r": 2}, 1, "settings", "lora.r"),
    "another seed": ({"seed": 7}, 1, "settings", "seed: 42 and 7"),
    "more rows per step": ({"training.gradient_accumulation_steps": 4}, 1, "settings", "accumulation_steps: 2 and 4"),
    "other micro-batches": ({"training.micro_batch_tokens": 4096}, 1, "rounding", "cut into"),
}
"""What is planted: the settings, the first step that differs, what differs first, and words that name it."""


@pytest.fixture
def base(runs: Any) -> Path:
    return runs(KEYS).path


def rows_of(base: Path) -> Path:
    config = yaml.safe_load((base / "config.yaml").read_text(encoding="utf-8"))
    return Path(config["dataset"]["train_file"])


SHARE = ("another learning rate", "another beta", "another seed", "other micro-batches")
"""What the suite tries; all of it is nightly."""


@pytest.mark.share(1)
@pytest.mark.parametrize("name", [n if n in SHARE else pytest.param(n, marks=pytest.mark.nightly) for n in PLANTED])
def test_a_planted_setting_is_named(name: str, base: Path, runs: Any) -> None:
    keys, step, kind, words = PLANTED[name]
    found = compare(base, runs({**KEYS, **keys}).path)
    assert (found.step, found.kind) == (step, kind), found
    assert words in found.words


def with_rows(runs: Any, base: Path, tmp_path: Path, change: Callable[[list[str]], list[str]]) -> Parting:
    lines = rows_of(base).read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(change(lines)) + "\n")
    return compare(base, runs({**KEYS, "dataset.train_file": str(tmp_path / "pairs.jsonl")}, fresh=True).path)


def test_a_row_that_was_changed_is_told_from_rows_in_another_order(base: Path, runs: Any, tmp_path: Path) -> None:
    changed = with_rows(runs, base, tmp_path, lambda rows: [rows[0].replace("question", "answer"), *rows[1:]])
    assert changed.kind == "rows" and "1 rows are only in the first run and 1 only in the second" in changed.words
    order = with_rows(runs, base, tmp_path, lambda rows: rows[::-1])
    assert (order.step, order.kind) == (1, "data order")


@pytest.mark.nightly
def test_other_weights_are_told(base: Path, runs: Any) -> None:
    found = compare(base, runs({**KEYS, "models.0.huggingface_id": str(runs.files["other"])}).path)
    assert (found.step, found.kind) == (1, "settings") and "models.huggingface_id" in found.words


def edited(base: Path, copy: Path, line: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
    """The run as it would be on another computer, or with other weights under the same name."""
    shutil.copytree(base, copy)
    lines = [json.loads(x) for x in (base / "ledger.jsonl").read_text().splitlines()]
    lines[2] |= {name: change(lines[2][name]) for name, change in line.items()}
    (copy / "ledger.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = json.loads((base / "environment.json").read_text()) | environment
    (copy / "environment.json").write_text(json.dumps(found))
    return copy


def test_rounding_and_hardware_are_told_apart(base: Path, tmp_path: Path) -> None:
    bit = {"loss": lambda x: x * (1 + 1e-12), "grad_norm": lambda x: x * (1 + 1e-12)}
    hardware = compare(base, edited(base, tmp_path / "hardware", bit, {"processor": "another one"}))
    assert (hardware.step, hardware.kind) == (3, "hardware") and "another one" in hardware.words
    threads = compare(base, edited(base, tmp_path / "threads", bit, {"num_threads": 99}))
    assert (threads.step, threads.kind) == (3, "rounding") and "num_threads" in threads.words
    nothing = compare(base, edited(base, tmp_path / "nothing", {"loss": lambda x: x + 0.5}, {}))
    assert (nothing.step, nothing.kind) == (3, "unknown")
    same = compare(base, edited(base, tmp_path / "same", {"cut": lambda x: x[::-1]}, {"processor": "another one"}))
    assert same.step is None and same.environment  # how a step was cut is no difference of its own


def test_the_command(base: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", str(base), str(base)]) == 0
    assert "the same in all 4 steps" in capsys.readouterr().out
    other = edited(base, tmp_path / "run", {"weights": lambda x: "0"}, {})
    assert main(["compare", str(base), str(other), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main(["compare", str(base)]) == 1
    (other / "ledger.jsonl").unlink()
    assert main(["compare", str(base), str(other)]) == 1
    assert "has no ledger.jsonl" in capsys.readouterr().err


def test_a_half_written_line_and_a_later_start_are_no_difference(base: Path, tmp_path: Path) -> None:
    other = edited(base, tmp_path / "run", {}, {})
    whole = (other / "ledger.jsonl").read_text().splitlines(keepends=True)
    (other / "ledger.jsonl").write_text("".join(whole[1:]) + '{"step": 5, "rows": ["a')
    found = compare(base, other)
    assert found.step is None and found.num_steps == (4, 3)
