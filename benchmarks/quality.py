"""The same recipe in strop and in TRL from the same base: do they reach the same held-out numbers?

    python benchmarks/quality.py --base BASE --data DATA --out OUT [--trainer strop|trl|both] [--sft-rate ...]

SFT on instruct_sft, then DPO on hh_helpful, one epoch each, float32, full training, rows in the same order. Each side
trains DPO from its own SFT model. Prints one JSON line a stage and side: held-out loss, reward accuracy, seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import strop
from strop.config import RunConfig
from strop.wiring import prepare

BATCH, ACCUMULATION, SEED = 8, 2, 42


def config_of(stage: str, model: Path, args: argparse.Namespace) -> RunConfig:
    rows = "instruct_sft" if stage == "sft" else "hh_helpful"
    return strop.load_config(
        overrides={
            "seed": SEED,
            "models": [{"name": stage, "huggingface_id": str(model)}],
            "dataset": {
                "train_file": str(args.data / f"{rows}.train.jsonl"),
                "val_file": str(args.data / f"{rows}.val.jsonl"),
            },
            "post_training": {"method": stage},
            "training": {
                "output_dir": str(args.out / "strop"),
                "max_steps": args.max_steps,
                "per_device_train_batch_size": BATCH,
                "per_device_eval_batch_size": BATCH,
                "gradient_accumulation_steps": ACCUMULATION,
                "learning_rate": args.sft_rate if stage == "sft" else args.dpo_rate,
                "warmup_steps": 0,
                "max_seq_length": 2048,
                "max_prompt_length": None,
                "max_completion_length": None,
                "eval_steps": 10_000,
                "save_steps": 10_000,
                "logging_steps": 20,
            },
            "finetuning": {"load_best_model_at_end": False, "early_stopping_patience": None},
        }
    )


def run_strop(stage: str, model: Path, args: argparse.Namespace) -> Path:
    started = time.perf_counter()
    (result,) = strop.train(config_of(stage, model, args), overwrite=True)
    records = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    last = [r for r in records if r["split"] == "eval"][-1]
    report("strop", stage, last["loss"], last.get("rewards/accuracies"), last.get("rewards/margins"), started)
    return result.final


def run_trl(stage: str, model: Path, args: argparse.Namespace) -> Path:
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    config = config_of(stage, model, args)
    plan = prepare(config, config.models[0]).plan
    order = [i for step in range(1, plan.num_steps + 1) for i in plan.groups(step)]
    files = {"train": config.dataset.train_file, "val": config.dataset.val_file}
    rows = load_dataset("json", data_files=files)
    out = args.out / "trl" / stage
    shutil.rmtree(out, ignore_errors=True)
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "num_train_epochs": 1,
        "max_steps": args.max_steps or -1,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": config.training.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_length": 2048,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 20,
        "disable_tqdm": True,
        "seed": SEED,
    }
    common = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        "train_dataset": rows["train"].select(order),
        "eval_dataset": rows["val"],
        "processing_class": AutoTokenizer.from_pretrained(model),
    }
    if stage == "sft":
        trainer = trl.SFTTrainer(**common, args=trl.SFTConfig(**settings, assistant_only_loss=True))
    else:
        reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        trainer = trl.DPOTrainer(**common, ref_model=reference, args=trl.DPOConfig(**settings, beta=0.1))
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model(str(out))
    accuracy, margin = found.get("eval_rewards/accuracies"), found.get("eval_rewards/margins")
    report("trl", stage, found["eval_loss"], accuracy, margin, started)
    return out


def report(side: str, stage: str, loss: float, accuracy: float | None, margin: float | None, started: float) -> None:
    seconds = round(time.perf_counter() - started, 1)
    row = {"side": side, "stage": stage, "loss": loss, "accuracy": accuracy, "margin": margin, "seconds": seconds}
    print("RESULT " + json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trainer", choices=("strop", "trl", "both"), default="both")
    parser.add_argument("--sft-rate", type=float, default=3e-4)
    parser.add_argument("--dpo-rate", type=float, default=2e-5)
    parser.add_argument("--max-steps", type=int, default=None)
    args = parser.parse_args()
    for side, run in (("strop", run_strop), ("trl", run_trl)):
        if args.trainer in (side, "both"):
            run("dpo", run("sft", args.base, args), args)


if __name__ == "__main__":
    main()
