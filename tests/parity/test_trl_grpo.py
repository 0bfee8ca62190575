"""Whole runs beside TRL 1.16's GRPOTrainer, with the same completions and rewards injected: the same losses, gradients
and weights over five steps, where the definitions agree (docs/methods/parity.md)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import strop
from strop.objectives.advantages import normalised_sum
from strop.plan.order import Plan

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests; install the extra `dev`")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future

STEPS, PROMPTS, SIZE = 5, 2, 4
WORDS = ["hello world", "what is this", "yes or no", "count again", "the quick brown fox"]


def rows_of(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)

    def ids() -> list[int]:
        length = int(torch.randint(2, 9, (), generator=draw))
        return [*torch.randint(5, 60, (length,), generator=draw).tolist(), int(tokenizer.eos_token_id)]

    return [
        {
            "prompt": f"{WORDS[i % 5]} {i}",
            "prompt_ids": list(tokenizer(f"{WORDS[i % 5]} {i}")["input_ids"]),
            "completion_ids": [ids() for _ in range(SIZE)],
            "rewards": torch.rand(SIZE, generator=draw).tolist(),
        }
        for i in range(STEPS * PROMPTS)
    ]


WEIGHTS = (1.0, 0.25)


def with_two_rewards(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with a second reward of another scale, which is the same for all in the first group."""
    draw = torch.Generator().manual_seed(4)
    out = []
    for i, row in enumerate(rows):
        second = [3.0] * SIZE if i == 0 else (10 * torch.rand(SIZE, generator=draw)).round().tolist()
        total = [WEIGHTS[0] * a + WEIGHTS[1] * b for a, b in zip(row["rewards"], second, strict=True)]
        normalised = normalised_sum([row["rewards"], second], WEIGHTS)
        out.append({**row, "each": [row["rewards"], second], "rewards": total, "normalised_rewards": list(normalised)})
    return out


def ours(folder: Path, rows: list[dict[str, Any]], method: dict[str, Any]) -> tuple[list[dict[str, Any]], Path]:
    names = ("prompt_ids", "completion_ids", "rewards")
    names += ("normalised_rewards",) if "normalised_rewards" in rows[0] else ()
    lines = [json.dumps({name: row[name] for name in names}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    overrides = {
        "models": [{"huggingface_id": str(folder / "model"), "name": "ours"}],
        "dataset": {"train_file": str(folder / "rows.jsonl"), "validation_split": 0.0},
        "post_training": {"method": "grpo", **method},
        "training": {
            "output_dir": str(folder / "out"),
            "groups_per_step": PROMPTS,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "max_grad_norm": None,
            "logging_steps": 1,
        },
    }
    (result,) = strop.train(strop.load_config(overrides=overrides))
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return records, result.final


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))


def theirs(
    folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> tuple[list[float], list[float], torch.nn.Module]:
    from datasets import Dataset

    order = [rows[i] for step in range(1, STEPS + 1) for i in Plan.of(len(rows), PROMPTS, 1, None, 42).groups(step)]
    wanted = [
        {
            (row["prompt"], *ids): r
            for row in rows
            for ids, r in zip(row["completion_ids"], row.get("each", [row["rewards"]])[k], strict=True)
        }
        for k in range(len(rows[0].get("each", [0])))
    ]
    given = {tuple(row["prompt_ids"]): row["completion_ids"] for row in rows}

    class Injected(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            return [given[tuple(ids)][i % SIZE] for i, ids in enumerate(prompt_ids)], None

    def rewarding(k: int) -> Callable[..., list[float]]:
        def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [wanted[k][(p, *ids)] for p, ids in zip(prompts, completion_ids, strict=True)]

        return reward

    norms = Norms()
    args = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PROMPTS * SIZE,
        num_generations=SIZE,
        max_completion_length=16,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=0.0,
        logging_steps=1,
        num_train_epochs=1,
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = Injected(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=[rewarding(k) for k in range(len(wanted))],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in order]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        callbacks=[norms],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [r["loss"] for r in trainer.state.log_history if "loss" in r], norms.norms, trainer.model


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ({}, {"loss_type": "grpo"}),
        ({"algorithm": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        ({"beta": 0.5, "entropy_coef": 0.2}, {"loss_type": "grpo", "beta": 0.5, "entropy_coef": 0.2}),
        (
            {"algorithm": "dr_grpo", "normalizer_length": 16},
            {"loss_type": "dr_grpo", "scale_rewards": "none"},
        ),
        (
            {"algorithm": "gdpo"},
            {
                "loss_type": "grpo",
                "multi_objective_aggregation": "normalize_then_sum",
                "reward_weights": list(WEIGHTS),
            },
        ),
    ],
    ids=["grpo", "dapo", "grpo-beta-entropy", "dr_grpo", "gdpo"],
)
def test_five_steps_are_those_of_trl(
    method: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    rows = rows_of(tokenizer)
    if method.get("algorithm") == "gdpo":
        rows = with_two_rewards(rows)
    records, final = ours(tmp_path, rows, method)
    losses, norms, model = theirs(tmp_path, rows, settings)
    assert len(records) == len(losses) == len(norms) == STEPS
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(final).state_dict()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    other = model.state_dict()
    apart, moved = (
        torch.cat([(a[name] - b[name]).double().flatten() for name in before]).norm()
        for a, b in ((trained, other), (other, before))
    )
    assert apart < 1e-4 * moved
