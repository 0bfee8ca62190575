"""Runs on bases in 4 and 8 bits, by every method, and what becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import strop
from strop.cli import main
from strop.config.methods import METHODS
from strop.errors import CheckpointError
from strop.export.merge import merge
from strop.policy.model.configuration import quiet


@pytest.mark.share(2)
@pytest.mark.parametrize("method", [name for name, settings in METHODS.items() if settings.ROWS != "group"])
def test_every_method_trains_on_four_bits(method: str, runs: Any) -> None:
    keys = {"models.0.quant": "4bit", "post_training.method": method}
    if method == "distill":
        keys["post_training.teacher_model_id"] = str(runs.files["model"])
    run = runs(keys, r=4, max_steps=2)
    losses = run.series("loss")
    assert len(losses) == 2 and run.series("loss", "eval")
    moved = [float(weight.abs().max()) for name, weight in run.final.items() if "lora_B" in name]
    assert moved and min(moved) > 0


@pytest.fixture
def stored(runs: Any, tmp_path: Path) -> Path:
    """The model of the runs as transformers saves it in 4 bits."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with quiet():
        module = AutoModelForCausalLM.from_pretrained(
            runs.files["model"], quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32
        )
        module.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(runs.files["model"]).save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.nightly
@pytest.mark.parametrize("quant", ["4bit", "8bit", "stored"])
def test_a_run_is_generated_with_and_merged_on_the_numbers_it_was_trained_on(
    quant: str, runs: Any, stored: Path, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"models.0.huggingface_id": str(stored)} if quant == "stored" else {"models.0.quant": quant}
    run = runs(keys, r=4, learning_rate=5e-2)
    assert run.series("loss", "eval")[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the same quantised model
    proof = merge(str(run.path), tmp_path / "merged", dtype=torch.float32)
    assert not proof.failed and proof.rounded < 1e-3 * proof.moved
    assert any(line.what == "greedy texts: 20 of 20 equal" for line in proof.lines)
    asked = ["hello", "--max-new-tokens", "8"]
    answers = []
    for source in (run.path, tmp_path / "merged"):
        capsys.readouterr()
        assert main(["generate", str(source), *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.nightly
def test_a_resumed_run_is_an_unbroken_one(runs: Any, tmp_path: Path) -> None:
    keys = {"models.0.quant": "4bit", "training.save_steps": 2}
    run = runs(keys, r=4)
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    config = runs.config(keys, r=4).with_values({"training.output_dir": str(tmp_path)}, "the test")
    strop.train(config, resume="auto")
    assert runs.same_run(run, type(run)(tmp_path / "run"))
    other = config.with_values({"models": (config.models[0].model_copy(update={"quant": "8bit"}),)}, "the test")
    shutil.rmtree(tmp_path / "run/final")
    with pytest.raises(CheckpointError, match="weights that the run started from have changed"):
        strop.train(other, resume=str(tmp_path / "run/checkpoint-2"))
