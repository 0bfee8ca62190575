"""Runs with `models[].add_tokens`, from rows to answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import strop
from strop.cli import main
from strop.config.layers import load_config
from strop.errors import CheckpointError, ConfigError

# plain peft 0.21 on transformers 5.23, as users load the result
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NEW = ("<think>", "</think>")


@pytest.fixture
def keys(runs: Any, tmp_path: Path) -> dict[str, Any]:
    """A DPO run whose answers hold new tokens."""
    rows = [
        {"prompt": f"question {i}", "chosen": f"<think>hello</think> yes {i}", "rejected": "<think>no</think> maybe"}
        for i in range(16)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"huggingface_id": str(runs.files["model"]), "name": "run", "add_tokens": NEW}
    return {
        "models": [model],
        "dataset.train_file": str(file),
        "lora.enabled": True,
        "lora.r": 4,
        "lora.lora_dropout": 0.0,
        "training.save_steps": 2,
    }


@pytest.mark.nightly
def test_models__add_tokens(
    keys: dict[str, Any], runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with new tokens goes on after a break, and its adapter answers, merges and is judged."""
    run = runs(keys)
    assert run.series("loss", "eval")[0] == pytest.approx(0.6931, abs=1e-4)  # the reference has the same rows
    tokenizer = AutoTokenizer.from_pretrained(run.path / "final")
    ids = tokenizer.convert_tokens_to_ids(list(NEW))
    assert ids == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert run.adapter["trainable_token_indices"] == {"model.embed_tokens": ids, "lm_head": ids}
    assert "AutoPeftModelForCausalLM" in (run.path / "final/README.md").read_text()
    # the code of the model card
    model = AutoPeftModelForCausalLM.from_pretrained(run.path / "final", dtype=torch.float32)
    assert model(torch.tensor([ids])).logits.isfinite().all()

    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    config = runs.config(keys).with_values({"training.output_dir": str(tmp_path)}, "the test")
    strop.train(config, resume="auto")
    assert runs.same_run(run, runs.at(tmp_path / "run"))

    shutil.rmtree(tmp_path / "run/final")
    other = config.models[0].model_copy(update={"add_tokens": (*NEW, "<more>")})
    with pytest.raises(CheckpointError, match="add_tokens"):
        strop.train(config.with_values({"models": (other,)}, "the test"), resume=str(tmp_path / "run/checkpoint-2"))

    capsys.readouterr()
    assert main(["generate", str(run.path), "<think>hello</think>", "--max-new-tokens", "4", "--base"]) == 0
    assert main(["merge", str(run.path), "--output-dir", str(tmp_path / "merged")]) == 0
    numbers = tmp_path / "numbers.json"
    models = [str(run.path), str(tmp_path / "merged")]
    data = ["--data", keys["dataset.train_file"], "--method", "orpo"]
    assert main(["eval", *models, *data, "--output", str(numbers)]) == 0
    found = json.loads(numbers.read_text())
    losses = [model["metrics"]["loss"]["value"] for model in found["models"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.nightly
def test_another_model_beside_the_policy_gets_the_same_tokens(keys: dict[str, Any], runs: Any) -> None:
    run = runs({**keys, "post_training.ref_model_id": str(runs.files["other"]), "training.max_steps": 1})
    assert run.steps() == [1]


def test_sharded_adapters_with_new_tokens_are_refused() -> None:
    models = [{"huggingface_id": "org/a", "add_tokens": NEW}]
    with pytest.raises(ConfigError, match="rows of new tokens"):
        load_config(overrides={"models": models, "gpu.fsdp": True, "lora.enabled": True})
    load_config(overrides={"models": models, "gpu.fsdp": True})
