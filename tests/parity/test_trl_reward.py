"""The same rows, model, order and optimizer in TRL 1.16's RewardTrainer: the same losses, accuracies and gradients.

Its rows are rendered by the chat template whole, with what stands behind the last answer; so are those of a reward
model here. A step is one micro-batch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

import strop
from conftest import WITH_ENDS
from parity.test_trl import QUESTIONS, ROWS, STEPS, FirstGradient
from strop.engine.step import forward_backward
from strop.objectives.base import build_objective
from strop.plan.order import Plan
from strop.policy.build import build_policy
from strop.prepared import prepare

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests; install the extra `dev`")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future


def row(i: int, margin: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt": [{"role": "user", "content": f"{QUESTIONS[i % 5]} {i}"}],
        "chosen": [{"role": "assistant", "content": "yes, maybe " * (1 + i % 4) + "over"}],
        "rejected": [{"role": "assistant", "content": "no dog " * (1 + (i * 3) % 5) + "lazy"}],
    }
    return {**found, "margin": 0.25 * (i % 3)} if margin else found


def reward_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(LlamaConfig(**WITH_ENDS, num_labels=1))


@pytest.mark.share(1)
@pytest.mark.parametrize(("margin", "coefficient"), [(False, 0.0), (True, 0.01)])
def test_losses_accuracies_and_gradients_are_those_of_trl(
    margin: bool, coefficient: float, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    reward_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [row(i, margin) for i in range(STEPS * ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(tmp_path / "model")}],
            "dataset.train_file": str(tmp_path / "rows.jsonl"),
            "dataset.validation_split": 0.0,
            "post_training": {"method": "reward", "center_rewards_coefficient": coefficient},
            "training": {
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": ROWS,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "max_grad_norm": None,
                "logging_steps": 1,
            },
        }
    )
    (result,) = strop.train(config)
    ours = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    prepared = prepare(config, config.models[0])
    policy = build_policy(config, config.models[0], torch.device("cpu"))
    groups = [prepared.data.train[i] for i in prepared.plan.groups(1)]
    forward_backward(policy, build_objective(config.post_training), [policy.collate(groups)])
    gradient = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}

    theirs, first = trained_by_trl(tmp_path, [rows[i] for s in range(1, STEPS + 1) for i in order(s)], coefficient)
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    assert [r["rewards/margins"] for r in ours] == pytest.approx([r["margin"] for r in theirs], rel=1e-4)
    assert [r["rewards/accuracies"] for r in ours] == [r["accuracy"] for r in theirs]
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-2), "nothing was learnt"
    assert gradient.keys() == first.keys()
    apart = math.sqrt(sum(float((gradient[n] - g).square().sum()) for n, g in first.items()))
    assert apart / math.sqrt(sum(float(g.square().sum()) for g in first.values())) < 1e-5


def order(step: int) -> Any:
    return Plan.of(STEPS * ROWS, ROWS, 1, None, 42).groups(step)


def trained_by_trl(folder: Path, rows: list[dict[str, Any]], coefficient: float) -> tuple[list[Any], dict[str, Any]]:
    from datasets import Dataset

    args = trl.RewardConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        num_train_epochs=1,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        max_length=512,
        center_rewards_coefficient=coefficient or None,
    )
    first = FirstGradient()
    trainer = trl.RewardTrainer(
        model=reward_model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        callbacks=[first],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [r for r in trainer.state.log_history if "loss" in r], first.taken
