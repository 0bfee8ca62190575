"""What `strop import` makes of a file of TRL that says little: the values that TRL 1.16 itself has by default."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from strop.config import load_config
from strop.importers import import_file, to_text

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests; install the extra `dev`")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future

SAME = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "per_device_train_batch_size",
    "per_device_eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "optim": "optim",
    "max_length": "max_seq_length",
    "max_completion_length": "max_completion_length",
}


def defaults(name: str) -> dict[str, Any]:
    return {
        f.name: f.default
        if f.default is not MISSING
        else f.default_factory()
        if f.default_factory is not MISSING
        else None
        for f in fields(getattr(trl, name))
    }


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "grpo"])
def test_defaults_are_those_of_trl(method: str, tmp_path: Path) -> None:
    theirs = defaults(f"{method.upper()}Config")
    given = {"model_name_or_path": "org/model", "dataset_name": "rows.jsonl"}
    if method == "grpo":
        given["reward_funcs"] = "rewards.mine"
    (tmp_path / "a.json").write_text(json.dumps(given))
    found = import_file(tmp_path / "a.json", "trl", {"post_training.method": method})
    (tmp_path / "a.yaml").write_text(to_text(found))
    config = load_config(tmp_path / "a.yaml")
    for name, ours in SAME.items():
        if name in theirs:
            assert getattr(config.training, ours) == theirs[name], name
    assert config.training.bf16 is True  # None there: bf16 unless fp16 is set
    assert config.seed == theirs["seed"]
    assert config.finetuning.load_best_model_at_end == theirs["load_best_model_at_end"]
    assert not config.lora.enabled
    settings = config.post_training
    if method == "dpo":
        assert [settings.loss_type] == theirs["loss_type"] and settings.beta == theirs["beta"]
        assert settings.label_smoothing == theirs["label_smoothing"]
    if method == "kto":
        assert settings.kto_loss == theirs["loss_type"] and settings.beta == theirs["beta"]
    if method == "grpo":
        assert (settings.beta, settings.epsilon, settings.epsilon_high) == (theirs["beta"], theirs["epsilon"], 0.2)
        assert theirs["loss_type"] == "dapo" and settings.aggregation == "token" and settings.advantage == "group"
        assert config.rollout.num_generations == theirs["num_generations"]


def test_defaults_of_adapters_are_those_of_trl(tmp_path: Path) -> None:
    theirs = defaults("ModelConfig")
    (tmp_path / "a.yaml").write_text(
        "model_name_or_path: org/m\nuse_peft: true\nload_in_4bit: true\ndataset_name: a.jsonl\nld_alpha: 1.0\n"
    )
    found = import_file(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(to_text(found))
    config = load_config(tmp_path / "b.yaml")
    assert config.lora.r == theirs["lora_r"] and config.lora.lora_alpha == theirs["lora_alpha"]
    assert config.lora.lora_dropout == theirs["lora_dropout"]
    assert config.models[0].bnb_double_quant == theirs["use_bnb_nested_quant"]
    assert config.models[0].bnb_quant_type == theirs["bnb_4bit_quant_type"]


@pytest.mark.parametrize(
    "name", ["SFTConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "ModelConfig", "ScriptArguments"]
)
def test_every_key_of_trl_is_known(name: str, tmp_path: Path) -> None:
    """A file with every key at its default: nothing of it is unknown."""
    given = {key: value for key, value in defaults(name).items() if value is not None and key != "output_dir"}
    given = json.loads(json.dumps(given, default=str))
    (tmp_path / "a.json").write_text(json.dumps(given))
    method = name.removesuffix("Config").lower()
    overrides = {
        "models.0.huggingface_id": "org/m",
        "dataset.train_file": "a.jsonl",
        "post_training.method": method if method in ("sft", "dpo", "kto", "grpo") else "sft",
        "rewards": [{"name": "exact_match"}],
    }
    if method != "grpo":
        del overrides["rewards"]
    found = import_file(tmp_path / "a.json", "trl", overrides)
    assert [e.key for e in found.entries if e.answer.why == "strop has no such setting"] == []
