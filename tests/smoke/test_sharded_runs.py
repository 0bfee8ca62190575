"""Whole runs with `gpu.fsdp`: the losses, margins and weights of one process, also after resumes on other meshes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from conftest import build_tokenizer
from same_runs import CUT, KINDS, LORA, RELATIVE, assert_close, assert_same_run, in_many, train
from strop.config.layers import load_config
from strop.errors import CheckpointError, ConfigError

FSDP = {"gpu.fsdp": True}
SAVED = {"training.save_steps": 2, "training.save_total_limit": None}


def test_a_sharded_run_is_that_of_one_process_and_goes_on_anywhere(runs: Any) -> None:
    """All weights train; sharded over 2, then one process, then 2 x 2: the steps that follow are the same."""
    settings = {**KINDS["dpo"], **CUT, **SAVED, "training.max_steps": 6, "training.reference_store": True}
    best = {"finetuning.load_best_model_at_end": True, "finetuning.metric_for_best_model": "eval_loss"}
    settings |= best
    alone = runs(settings)  # which leaves log-probs of the reference in the store
    begun = in_many(2, runs.config({**settings, **FSDP}))
    assert_same_run(alone, runs.at(begun))
    files = {path.name for path in (begun / "checkpoint-2").iterdir()}
    assert files == {
        "MANIFEST.json",
        "state.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    }
    then = train(runs.config(settings), resume=str(begun / "checkpoint-2"))[0]
    last = in_many(4, runs.config({**settings, **FSDP, "gpu.shard_size": 2}), str(then / "checkpoint-4"))
    for run, first in ((runs.at(then), 3), (runs.at(last), 5)):
        assert run.steps() == list(range(first, 7))
        assert run.series("loss") == pytest.approx(alone.series("loss")[first - 1 :], rel=RELATIVE)
        assert_close(alone.final, run.final)
    (last / "checkpoint-6" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shard-00002"):
        train(runs.config(settings), resume=str(last / "checkpoint-6"))


@pytest.mark.nightly
def test_sharded_adapters(runs: Any) -> None:
    """Also adapters and modules that train whole are gathered for final/ and found again by a resume."""
    settings = {**KINDS["kto"], **LORA, **CUT, **SAVED, "lora.modules_to_save": ["lm_head"]}
    alone = runs(settings)
    config = runs.config({**settings, **FSDP})
    run = runs.at(in_many(2, config))
    assert_same_run(alone, run)
    (run.path / "final").rename(run.path / "elsewhere")
    for path in run.path.glob("checkpoint-4"):
        path.rename(path.with_name("away"))
    assert in_many(2, config, "auto") == run.path
    assert_same_run(alone, run)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["dpo", pytest.param("sft", marks=pytest.mark.nightly)])
def test_sharded_adapters_of_a_base_in_4_bits(runs: Any, kind: str) -> None:
    """The reference is the base without adapters; a checkpoint goes on in one process, whose base lies in bytes."""
    pytest.importorskip("bitsandbytes")
    settings = {**KINDS[kind], **LORA, **CUT, **SAVED, "lora.enabled": True, "models.0.quant": "4bit"}
    alone = runs(settings)
    run = runs.at(in_many(2, runs.config({**settings, **FSDP})))
    assert_same_run(alone, run)
    then = runs.at(train(runs.config(settings), resume=str(run.path / "checkpoint-2"))[0])
    assert then.steps() == [3, 4]
    assert_close(alone.final, then.final)


SAMPLES: dict[str, Any] = {
    "post_training.method": "grpo",
    "post_training.beta": 0.1,
    "rollout.num_generations": 2,
    "rewards": [
        {"name": "regex", "settings": {"pattern": "a"}},
        {"name": "length", "settings": {"max_length": 8, "cache": 8}},
    ],
    "training.max_completion_length": 8,
    "training.groups_per_step": 3,
    "training.learning_rate": 1e-3,
}
"""A run that samples; of its three prompts per step one process has one, the other two."""


FILLED = {"rollout.dynamic_sampling": True}
"""Prompts without a pair are replaced."""


def of_kind(kind: str, runs: Any, tmp_path: Path) -> dict[str, Any]:
    """The keys of a run in which more than one forward and backward pass per step touches a model."""
    singles = {"dataset.train_file": str(runs.files["singles"])}
    match kind:
        case "grpo":
            return {**SAMPLES, **singles}
        case "grpo, a base in 4 bits":
            four = {"models": [{"huggingface_id": str(runs.files["model"]), "name": "run", "quant": "4bit"}]}
            return {**SAMPLES, **singles, **LORA, **four}
        case "grpo lora, two steps per round, scored again":
            again = {"rollout.num_iterations": 2, "post_training.sampler_correction": "token_mask"}
            return {**SAMPLES, **singles, **LORA, **again}
        case "grpo, another reference, fewer prompts than processes":
            other = {"post_training.ref_model_id": str(runs.files["other"]), "training.groups_per_step": 1}
            return {**SAMPLES, **singles, **other}
        case "grpo, rewarded by a model":
            return {**SAMPLES, **singles, "rewards": [f"model:{judge(tmp_path)}"]}
        case "online dpo":
            return {**SAMPLES, **singles, "post_training.method": "dpo", "post_training.online": True, **FILLED}
        case "reward":
            return {**CUT, "post_training.method": "reward"}
        case "reward lora":
            return {**CUT, **LORA, "post_training.method": "reward"}
        case "distill" | "distill lora":
            teacher = {"post_training.method": "distill", "post_training.teacher_model_id": str(runs.files["other"])}
            return {**CUT, **teacher, **(LORA if kind.endswith("lora") else {})}
        case "distill on policy, by divergence" | "distill on policy, by policy gradient":
            teacher = {"post_training.method": "distill", "post_training.teacher_model_id": str(runs.files["other"])}
            own = {name: value for name, value in SAMPLES.items() if name not in ("rewards", "post_training.beta")}
            loss = "policy_gradient" if kind.endswith("gradient") else "divergence"
            return {**own, **singles, **teacher, "rollout.enabled": True, "post_training.distill_loss": loss}
        case _:
            assert kind == "samples"
            return {**CUT, "finetuning.sample_prompts": 3, "finetuning.sample_max_new_tokens": 6}


def judge(tmp_path: Path) -> Path:
    """A reward model."""
    tokenizer = build_tokenizer()
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), **sizes, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    ).save_pretrained(tmp_path / "judge")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


OFTEN = {"grpo, another reference, fewer prompts than processes", "reward", "distill", "samples"}
OTHERS = (
    "online dpo",
    "grpo",
    "grpo lora, two steps per round, scored again",
    "grpo, rewarded by a model",
    "grpo, a base in 4 bits",
    "distill on policy, by divergence",
    "distill on policy, by policy gradient",
    "reward lora",
    "distill lora",
)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [*sorted(OFTEN), *(pytest.param(k, marks=pytest.mark.nightly) for k in OTHERS)])
def test_what_needs_more_than_the_passes_of_a_step_is_sharded_too(kind: str, runs: Any, tmp_path: Path) -> None:
    settings = of_kind(kind, runs, tmp_path)
    alone = runs(settings)
    many = runs.at(in_many(2, runs.config({**settings, **FSDP})))
    assert len(alone.untimed) == len(many.untimed)
    for before, after in zip(alone.untimed, many.untimed, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            if name != "weights_digest" and not name.startswith("time/"):
                close = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert after[name] == close, (name, before["step"])
    assert_close(alone.final, many.final)
    for name in ("samples.jsonl", "rollouts.jsonl"):
        assert texts(alone.path / name) == texts(many.path / name)


def texts(file: Path) -> list[Any]:
    """What was sampled, in order."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["step"], line["prompt_number"], line.get("texts", line.get("completion"))) for line in lines]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"training.optim": "adamw_8bit"}, "adamw_8bit, which looks at more of a weight"),
        ({"models.0.quant": "8bit", "lora.enabled": True}, "models.0.quant is 8bit"),
        ({"models.0.quant": "4bit", "lora.enabled": True, "lora.use_dora": True}, "use_dora is true"),
        ({"post_training.method": "dpo", "post_training.ref_sync_steps": 2}, "ref_sync_steps keeps a second"),
        ({"gpu.use_ddp": True}, "fsdp and use_ddp are both true"),
        ({"training.fp16": True}, "training.fp16 scales its loss"),
        (
            {"post_training.method": "grpo", "rollout.sampler": "vllm", "rewards": ["x.py:f"], "lora.enabled": True},
            "vllm, which gets an adapter that one process has whole",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings: dict[str, Any], found: str) -> None:
    models = [{"huggingface_id": "org/a", "quant": settings.pop("models.0.quant", "none")}]
    with pytest.raises(ConfigError, match=found):
        load_config(overrides={"models": models, **FSDP, **settings})


def test_one_process_is_not_sharded(runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert runs({**FSDP, "training.max_steps": 1}).steps() == [1]
    assert "there is one process: nothing is sharded" in caplog.text
