"""A run folder of an older version: what is there is read, and what is missing is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.cli import main
from strop.engine.checkpoint import open_checkpoint
from strop.errors import CheckpointError
from strop.manifest import MANIFEST, seal

NOT_WRITTEN_THEN = (
    "ledger.jsonl",
    "pairs.json",
    "plan.json",
    "result.json",
    "report.html",
    "findings.json",
)
KEYS_OF_TODAY = ("rollout.", "rewards", "lora.init_lora_weights", "finetuning.score_samples")
KEYS = {"lr_scheduler": "constant", "r": 4, "save_steps": 2, "eval_steps": 4, "max_steps": 4}


def older(run: Path, copy: Path) -> Path:
    """A run as the first versions left it: without the files and the settings that came later."""
    shutil.copytree(run, copy)
    for name in NOT_WRITTEN_THEN:
        (copy / name).unlink()
    for folder in copy.glob("checkpoint-*"):
        checkpoint = open_checkpoint(folder)
        state = json.loads((folder / "state.json").read_text())
        state["recipe"] = without_keys_of_today(state["recipe"])
        (folder / "state.json").write_text(json.dumps(state))
        (folder / MANIFEST).unlink()
        seal(folder, checkpoint.step, checkpoint.identity)
    (copy / "final" / MANIFEST).unlink()
    return copy


def without_keys_of_today(recipe: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in recipe.items() if not key.startswith(KEYS_OF_TODAY)}
    assert len(kept) < len(recipe)
    return kept


@pytest.fixture
def old(runs: Any, tmp_path: Path) -> Path:
    return older(runs(KEYS).path, tmp_path / "out" / "run")


def config(runs: Any, old: Path, **changes: Any) -> strop.RunConfig:
    return runs.config({**KEYS, "training.output_dir": str(old.parent), **changes})


def test_the_report_reads_it(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(old)]) == 0
    assert (old / "report.html").is_file()
    listed = json.loads((old / "findings.json").read_text())["findings"]
    assert any(finding["severity"] == "unchecked" for finding in listed)


@pytest.mark.parametrize("words", [("compare", "{}", "{}"), ("replay", "{}", "--step", "1")])
def test_what_needs_a_ledger_says_so(words: tuple[str, ...], old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(old) for word in words]) == 1
    assert "this run has no ledger.jsonl" in capsys.readouterr().err


def test_it_answers(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(old), "hello", "--max-new-tokens", "2"]) == 0
    assert main(["merge", str(old), "--output-dir", str(old.parent / "merged")]) == 0


def test_it_goes_on_under_the_defaults_of_new_settings(runs: Any, tmp_path: Path) -> None:
    """As the run that was never stopped did; replay checks the steps that follow."""
    straight = runs({**KEYS, "max_steps": 6})
    old = older(straight.path, tmp_path / "out" / "run")
    for name in ("final", "checkpoint-6"):  # it was stopped after step 4
        shutil.rmtree(old / name)
    (result,) = strop.train(config(runs, old, max_steps=6), resume="auto")
    assert result.step == 6
    assert runs.same(runs.at(old).final, straight.final)
    assert main(["replay", str(old), "--step", "6"]) == 0


def test_a_new_setting_with_another_value_is_a_change(old: Path, runs: Any) -> None:
    shutil.rmtree(old / "final")
    with pytest.raises(CheckpointError) as refused:
        strop.train(config(runs, old, **{"lora.init_lora_weights": "gaussian"}), resume="auto")
    assert "lora.init_lora_weights: absent then, gaussian now" in str(refused.value)
    assert "rollout" not in str(refused.value)


def test_a_finished_one_is_finished(old: Path, runs: Any) -> None:
    before = runs.at(old).final
    (result,) = strop.train(config(runs, old), resume="auto")
    assert result.step == 4
    assert runs.same(runs.at(old).final, before)
