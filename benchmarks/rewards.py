"""Reward models beside TRL's RewardTrainer: the same first weights, rows, order and steps; accuracy on held-out pairs.

    python -m benchmarks.rewards --model DIR --train FILE --val FILE [--pairs N] [--val-pairs N] [--seeds 1,2,3]

Both train all weights for one epoch from one reward model, whose head is drawn from the seed, at a constant batch of 8
pairs. Each is evaluated by its own code on the same held-out pairs. Prints a table, and JSON with `--output FILE`.
"""

from __future__ import annotations

import argparse
import json
import math
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

BATCH, RATE, LENGTH = 8, 3e-5, 1024


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


def first_lines(source: str, num: int, target: Path) -> Path:
    with open(source, encoding="utf-8") as file:
        target.write_text("".join(line for line, _ in zip(file, range(num), strict=False)), encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train", "--val"):
        parser.add_argument(name, required=True)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--val-pairs", type=int, default=304)  # whole batches, of whose means TRL takes the mean
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = first_lines(options.train, options.pairs, folder / "train.jsonl")
        val = first_lines(options.val, options.val_pairs, folder / "val.jsonl")
        for seed in map(int, options.seeds.split(",")):
            model = start(options.model, seed, folder / f"start-{seed}")
            for side, train_by in (("strop", by_strop), ("trl", by_trl)):
                numbers = train_by(model, train, val, seed, folder / f"{side}-{seed}")
                found.append({"seed": seed, "side": side, **numbers})
                print(json.dumps(found[-1]), flush=True)
    for side in ("strop", "trl"):
        own = [f["accuracy"] for f in found if f["side"] == side]
        mean = sum(own) / len(own)
        noise = math.sqrt(mean * (1 - mean) / options.val_pairs)
        print(f"{side}: accuracy {mean:.4f} over {len(own)} seeds; noise of {options.val_pairs} pairs {noise:.4f}")
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
