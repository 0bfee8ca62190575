"""The same recipe in strop and in TRL from the same base: do they reach the same held-out numbers?

    python benchmarks/quality.py --base BASE --data DATA --out OUT [--trainer strop|trl|both] [--sft-rate ...]

SFT on instruct_sft, then DPO on hh_helpful, one epoch each, float32, full training, rows in the same order. Each side
trains DPO from its own SFT model. Both sides' models are judged by one ruler on the .val files (strop's evaluation:
token mean; reward accuracy over all pairs), since trainers average batches differently. Prints one JSON line a stage
and side: held-out loss, reward accuracy and margin, seconds of training and evaluations.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import strop
from strop.columns import Columns
from strop.config import RunConfig
from strop.engine.step_source import Cut, GroupSet, Part
from strop.engine.validation import evaluate
from strop.plan.micro_batch_size import default_budget
from strop.plan.row_tokens import packed_tokens
from strop.policy.build import build_policy
from strop.policy.group_logps import group_logps
from strop.prepared import prepare

BATCH, ACCUMULATION, SEED = 8, 2, 42
JUDGED = {"strop": "strop/{}/final", "trl": "trl/{}"}


def config_of(stage: str, model: Path, args: argparse.Namespace) -> RunConfig:
    rows = "instruct_sft" if stage == "sft" else "hh_helpful"
    return strop.load_config(
        overrides={
            "seed": SEED,
            "models": [{"name": stage, "huggingface_id": str(model)}],
            "dataset": {
                "train_file": str(args.data / f"{rows}.train.jsonl"),
                "val_file": str(args.data / f"{rows}.val.jsonl"),
                "max_samples": args.rows,
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


def judge(side: str, stage: str, model: Path, start: Path, seconds: float, args: argparse.Namespace) -> None:
    """Held-out figures of `model`, whose reference is `start`."""
    config = config_of(stage, model, args)
    prepared = prepare(config, config.models[0])
    groups = GroupSet(prepared.data.eval)
    parts = Cut(default_budget(groups.groups, BATCH, packed_tokens, "cpu"), packed_tokens).parts(groups)
    device = torch.device("cpu")
    if prepared.objective.needs_reference:
        reference = build_policy(config, config_of(stage, start, args).models[0], device)
        scored = group_logps(reference, [[groups.groups[i] for i in part] for part in parts])
        stored = dict(zip((i for part in parts for i in part), scored, strict=True))

        def ref_logps(part: Part) -> Columns:
            return Columns(per_token={"ref_logps": torch.cat([stored[i] for i in part])})

        groups = replace(groups, columns={"ref_logps": ref_logps})
    policy = build_policy(config, config.models[0], device)
    with policy.scoring():
        result = evaluate(policy, prepared.objective, (groups.batch(policy, part) for part in parts)).fetch()
    found = {name: total / count for name, (total, count) in result.metrics.items() if "rewards" in name}
    row = {"side": side, "stage": stage, "loss": result.loss, **found, "seconds": round(seconds, 1)}
    print("RESULT " + json.dumps(row), flush=True)


def run_strop(stage: str, model: Path, args: argparse.Namespace) -> Path:
    (result,) = strop.train(config_of(stage, model, args), overwrite=True)
    return result.final


def run_trl(stage: str, model: Path, args: argparse.Namespace) -> Path:
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    trainer.save_model(str(out))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trainer", choices=("strop", "trl", "both"), default="both")
    parser.add_argument("--sft-rate", type=float, default=3e-4)
    parser.add_argument("--dpo-rate", type=float, default=2e-5)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--rows", type=int, default=None, help="only the first rows of each training file")
    parser.add_argument("--judge", action="store_true", help="only judge the models that an earlier run left in OUT")
    args = parser.parse_args()
    for side, run in (("strop", run_strop), ("trl", run_trl)):
        if args.trainer in (side, "both"):
            start = args.base
            for stage in ("sft", "dpo"):
                started = time.perf_counter()
                model = run(stage, start, args) if not args.judge else args.out / JUDGED[side].format(stage)
                judge(side, stage, model, start, time.perf_counter() - started, args)
                start = model


if __name__ == "__main__":
    main()
