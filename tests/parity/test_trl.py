"""The same rows, model, order and optimizer in TRL 1.16's trainers: the same losses and the same first gradient.

Variants whose definitions agree: dpo sigmoid (with WPO's weights and with a reference that is synced too), hinge, ipo
(ipo_norm mean), sft with the token mean; orpo with the likelihood of the prompt too, simpo and cpo where a step is one
micro-batch, over which TRL takes the mean of their likelihoods. (kto_pair: TRL takes its KL over the micro-batch, lets
gradients through it, and averages the two halves.)
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
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

import strop
from scored import ref_columns
from strop.columns import NO_COLUMNS
from strop.config import RunConfig
from strop.engine.step import forward_backward
from strop.objectives.base import build_objective
from strop.plan.order import Plan
from strop.policy.build import build_policy
from strop.policy.group_logps import group_logps
from strop.prepared import prepare

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests; install the extra `dev`")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future

STEPS, ROWS = 5, 4
# no newline after the end of a turn: TRL would train it, strop never trains what follows the end token
CHATML = (
    "{% for m in messages %}{{ '\n' if not loop.first }}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = ["hello world", "what is this", "yes or no", "count again", "the quick brown fox"]


def row(i: int, pair: bool) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"{QUESTIONS[i % 5]} {i}"}]
    good = [{"role": "assistant", "content": "yes, maybe " * (1 + i % 4) + "over"}]
    bad = [{"role": "assistant", "content": "no dog " * (1 + (i * 3) % 5) + "lazy"}]
    return {"prompt": prompt, "chosen": good, "rejected": bad} if pair else {"prompt": prompt, "completion": good}


@pytest.fixture
def folder(
    tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    return tmp_path


def accumulation_of(method: dict[str, Any]) -> int:
    """Micro-batches of a step: one where TRL means over each of them."""
    return 1 if method["method"] in ("orpo", "simpo", "cpo") else 2


def config_of(folder: Path, method: dict[str, Any]) -> RunConfig:
    rows = [row(i, method["method"] != "sft") for i in range(STEPS * ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(folder / "model")}],
            "dataset.train_file": str(folder / "rows.jsonl"),
            "dataset.validation_split": 0.0,
            "post_training": method,
            "training": {
                "output_dir": str(folder / "out"),
                "per_device_train_batch_size": ROWS // accumulation_of(method),
                "gradient_accumulation_steps": accumulation_of(method),
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "max_grad_norm": None,
                "logging_steps": 1,
            },
        }
    )


def ours(config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    (result,) = strop.train(config)
    records = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    losses = [r["loss"] for r in records if r["split"] == "train"]

    prepared = prepare(config, config.models[0])
    policy = build_policy(config, config.models[0], torch.device("cpu"))
    groups = [prepared.data.train[i] for i in prepared.plan.groups(1)]
    objective = build_objective(config.post_training)
    columns = ref_columns(group_logps(policy, [groups])) if objective.needs_reference else NO_COLUMNS
    forward_backward(policy, objective, [policy.collate(groups, columns, objective.reads & policy.SUPPLIES)])
    return losses, {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}


class FirstGradient(TrainerCallback):
    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.taken:
            self.taken = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def theirs(
    folder: Path, method: dict[str, Any], make_model: Callable[..., Any]
) -> tuple[list[float], dict[str, Tensor]]:
    from datasets import Dataset
    from trl.experimental import cpo, orpo

    pair = method["method"] != "sft"
    plan = Plan.of(STEPS * ROWS, ROWS, 1, None, 42)
    rows = [row(i, pair) for step in range(1, STEPS + 1) for i in plan.groups(step)]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": ROWS // accumulation_of(method),
        "gradient_accumulation_steps": accumulation_of(method),
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "max_length": 512,
    }
    first = FirstGradient()
    common = {"model": make_model(), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    match method["method"]:
        case "sft":
            trainer = trl.SFTTrainer(**common, args=trl.SFTConfig(**settings), callbacks=[first])
        case "dpo":
            if sync := method.get("ref_sync_steps"):
                settings |= {"sync_ref_model": True, "ref_model_sync_steps": sync}
                settings["ref_model_mixup_alpha"] = method["ref_mixup_alpha"]
            args = trl.DPOConfig(
                **settings,
                beta=method.get("beta", 0.1),
                loss_type=method.get("loss_type", "sigmoid"),
                use_weighting=method.get("wpo_weighting", False),
            )
            trainer = trl.DPOTrainer(**common, ref_model=make_model(), args=args, callbacks=[first])
        case "orpo":
            trainer = orpo.ORPOTrainer(**common, args=orpo.ORPOConfig(**settings, beta=0.1), callbacks=[first])
        case "cpo":
            trainer = cpo.CPOTrainer(**common, args=cpo.CPOConfig(**settings, beta=0.1), callbacks=[first])
        case "simpo":
            own = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 2.0 * 0.5}
            trainer = cpo.CPOTrainer(**common, args=cpo.CPOConfig(**settings, **own), callbacks=[first])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [r["loss"] for r in trainer.state.log_history if "loss" in r], first.taken


@pytest.mark.share(1)
@pytest.mark.parametrize(
    "method",
    [
        {"method": "sft"},
        {"method": "dpo"},
        *(
            pytest.param(method, marks=pytest.mark.nightly)
            for method in (
                {"method": "dpo", "loss_type": "hinge", "beta": 0.3},
                {"method": "dpo", "loss_type": "ipo"},
                {"method": "dpo", "wpo_weighting": True},
            )
        ),
        {"method": "dpo", "ref_sync_steps": 2, "ref_mixup_alpha": 0.4},
        {"method": "orpo", "orpo_nll": "full"},
        {"method": "simpo"},
        {"method": "cpo"},
    ],
    ids=lambda m: "-".join(map(str, m.values())),
)
def test_losses_and_first_gradient_are_those_of_trl(
    method: dict[str, Any], folder: Path, make_model: Callable[..., Any]
) -> None:
    """The losses of dpo have one road in common; that of each is compared by `test_trl_losses.py`, and as a run by
    `make nightly`."""
    our_losses, our_gradient = ours(config_of(folder, method))
    their_losses, their_gradient = theirs(folder, method, make_model)
    assert len(our_losses) == len(their_losses) == STEPS
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    assert our_losses[-1] != pytest.approx(our_losses[0], rel=1e-2), "nothing was learnt"
    assert our_gradient.keys() == their_gradient.keys()
    apart = math.sqrt(sum(float((our_gradient[n] - g).square().sum()) for n, g in their_gradient.items()))
    size = math.sqrt(sum(float(g.square().sum()) for g in their_gradient.values()))
    assert apart / size < 1e-5
