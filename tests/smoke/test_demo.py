"""The demo from end to end: a small one in every run of the tests, the real one nightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from strop.demo import run_demo
from strop.demo.task import Size

SMALL = Size(256, 64, num_questions=4, num_validation=16, num_heldout_per_length=5, sft_epochs=1)


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["split"] == "eval"]


def test_a_small_demo_leaves_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "demo"
    for seed in (0, 1):  # the second run writes over the first
        path = run_demo(seed, folder, SMALL)
    assert path == folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    assert summary["seed"] == 1
    assert set(summary["heldout_accuracy"]) == {"base", "sft", "dpo", "grpo"}
    assert all(0 <= share <= 1 for share in summary["heldout_accuracy"].values())
    assert len(Path(summary["heldout_file"]).read_text(encoding="utf-8").splitlines()) == 20
    assert set(summary["models"]) == {"sft", "dpo", "grpo"}
    for name in summary["models"]:
        AutoModelForCausalLM.from_pretrained(summary["models"][name])
    assert len((folder / "grpo" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    for name in ("sft", "dpo"):
        first, *_, last = evaluations(folder / name)
        assert last["loss"] < first["loss"]
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert all(name in shown for name in ("base", "SFT", "DPO", "GRPO"))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_beats_sft_on_lists_it_never_saw(tmp_path: Path, seed: int) -> None:
    summary = json.loads(run_demo(seed, tmp_path / "demo").read_text(encoding="utf-8"))
    accuracy = summary["heldout_accuracy"]
    assert accuracy["base"] < 0.05
    assert accuracy["sft"] > 0.3
    assert accuracy["dpo"] > accuracy["sft"] + 0.25
    assert accuracy["grpo"] > accuracy["dpo"]
    first, *_, last = evaluations(tmp_path / "demo" / "dpo")
    assert last["rewards/margins"] > first["rewards/margins"] + 1
    assert last["rewards/accuracies"] > 0.9
