"""Reward models beside TRL's RewardTrainer: the same first weights, rows, order and steps; accuracy on held-out pairs.

    python -m benchmarks.rewards [--pairs N] [--val-pairs N] [--seeds 1,2,3] [--out benchmarks/results/rewards.json]

Both train all weights for one epoch from one reward model, whose head is drawn from the seed, at a constant batch of 8
pairs. Each is evaluated by its own code on the same held-out pairs. The model is ../shared/models/base-12m and the rows
are hh_helpful unless others are given.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import strop
from strop.plan.order import Plan
from strop.policy.model.task import draw_score

from .inputs import SHARED
from .measure import RESULTS, commit, describe_machine
from .report import REWARDS, reward_models

OUT = RESULTS / REWARDS
BATCH, RATE, LENGTH = 8, 3e-5, 2048  # longer than every row: TRL drops longer ones, strop cuts them


def start(model: str, seed: int, folder: Path) -> Path:
    """A reward model made of a language model, with a head drawn from the seed."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    made.config.pad_token_id = tokenizer.pad_token_id
    draw_score(made, seed)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_strop(model: Path, train: Path, val: Path, seed: int, folder: Path) -> dict[str, float]:
    config = strop.load_config(
        overrides={
            "seed": seed,
            "models": [{"huggingface_id": str(model), "name": "run"}],
            "dataset.train_file": str(train),
            "dataset.val_file": str(val),
            "post_training.method": "reward",
            "training.output_dir": str(folder),
            "training.num_epochs": 1,
            "training.groups_per_step": BATCH,
            "training.learning_rate": RATE,
            "training.warmup_steps": 0,
            "training.weight_decay": 0.0,
            "training.max_grad_norm": 1.0,
            "training.max_seq_length": LENGTH,
            "training.max_prompt_length": None,
            "training.max_completion_length": None,
            "training.eval_at_start": False,
            "training.eval_steps": 10**6,
            "training.save_steps": 10**6,
            "finetuning.load_best_model_at_end": False,
            "finetuning.early_stopping_patience": None,
        }
    )
    started = time.perf_counter()
    (result,) = strop.train(config)
    seconds = time.perf_counter() - started
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["split"] == "eval"][-1]
    return {"accuracy": last["rewards/accuracies"], "loss": last["loss"], "seconds": seconds}


def by_trl(model: Path, train: Path, val: Path, seed: int, folder: Path) -> dict[str, float]:
    import trl
    from datasets import Dataset

    rows = [json.loads(line) for line in train.read_text().splitlines()]
    plan = Plan.of(len(rows), BATCH, 1, None, seed)
    ordered = [rows[i] for step in range(1, plan.num_steps + 1) for i in plan.groups(step)]
    held_out = [json.loads(line) for line in val.read_text().splitlines()]
    args = trl.RewardConfig(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=RATE,
        num_train_epochs=1,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        max_length=LENGTH,
    )
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model),
        args=args,
        train_dataset=Dataset.from_list(ordered),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        trainer.train()
        found = trainer.evaluate()
    return {
        "accuracy": found["eval_accuracy"],
        "loss": found["eval_loss"],
        "seconds": time.perf_counter() - started,
    }


def first_lines(source: Path, num: int, most: int | None, target: Path) -> Path:
    """The first `num` rows, of those whose line has at most `most` characters."""
    with open(source, encoding="utf-8") as file:
        lines = (line for line in file if most is None or len(line) <= most)
        target.write_text("".join(line for line, _ in zip(lines, range(num), strict=False)), encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "base-12m")
    parser.add_argument("--train", type=Path, default=SHARED / "data" / "hh_helpful.train.jsonl")
    parser.add_argument("--val", type=Path, default=SHARED / "data" / "hh_helpful.val.jsonl")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--val-pairs", type=int, default=304)  # whole batches, of whose means TRL takes the mean
    parser.add_argument("--characters", type=int, help="rows whose lines are longer are left out")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = first_lines(options.train, options.pairs, options.characters, folder / "train.jsonl")
        val = first_lines(options.val, options.val_pairs, options.characters, folder / "val.jsonl")
        for seed in map(int, options.seeds.split(",")):
            model = start(str(options.model), seed, folder / f"start-{seed}")
            for side, train_by in (("strop", by_strop), ("trl", by_trl)):
                began = time.process_time()
                numbers = train_by(model, train, val, seed, folder / f"{side}-{seed}")
                runs.append({"seed": seed, "side": side, "processor": time.process_time() - began, **numbers})
                print(json.dumps(runs[-1]), flush=True)
            found = {
                "machine": describe_machine(),
                "commit": commit(),
                "model": options.model.name,
                "rows": options.train.name.removesuffix(".train.jsonl"),
                "characters": options.characters,
                "batch": BATCH,
                "pairs": options.pairs,
                "val_pairs": options.val_pairs,
                "runs": runs,
            }
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(reward_models(found)))


if __name__ == "__main__":
    main()
