"""Every method trains a real small base: does its objective fall, and what becomes of held-out rows, beside TRL?

    python benchmarks/methods.py --base BASE --data DATA --out OUT [--methods dpo kto] [--steps 100] [--trl]

A short SFT by strop on instruct_sft, then each method for so many steps from that model, through the command line, on
rows of hh_helpful (kto: kto_unpaired) that need no truncation, which trainers do differently, and as many as make whole
steps, since TRL's steps go on over the end of an epoch. Prints one JSON line a
method and side: the training loss of the first and the last tenth of the steps, and the held-out metrics before and
after. With --trl, TRL trains on the same rows in the same order from the same model; both models are judged by strop's
evaluation, since trainers average differently.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import strop
from strop.config import METHODS
from strop.prepared import prepare

SEED, BATCH, SFT_STEPS, HELD_OUT, LONGEST = 42, 4, 300, 300, 192
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "logps_per_token/chosen", "logps_per_token/rejected", "nll")
VARIANTS = {"exo_pair": {"label_smoothing": 1e-3}, "full": {"orpo_nll": "full"}}


def settings_of(method: str) -> dict[str, Any]:
    """`kto`, or `dpo:hinge` for a loss of dpo, or `orpo:full`, whose likelihood is TRL's."""
    name, _, variant = method.partition(":")
    loss = {"loss_type": variant} if name == "dpo" and variant else {}
    return {"method": name, **loss, **VARIANTS.get(variant, {})}


def write_config(
    method: str, model: Path, train_rows: Path, out: Path, args: argparse.Namespace, **training: Any
) -> Path:
    settings = settings_of(method)
    # the labelled file has no validation part of its own: pairs are unpaired
    held_out = args.data / f"{'instruct_sft' if method == 'sft' else 'hh_helpful'}.val.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    val = out / "val.jsonl"
    val.write_text("".join(held_out.read_text(encoding="utf-8").splitlines(keepends=True)[:HELD_OUT]), encoding="utf-8")
    config = {
        "seed": SEED,
        "models": [{"name": "model", "huggingface_id": str(model)}],
        "dataset": {
            "train_file": str(train_rows),
            "val_file": str(val),
            "max_samples": None if method == "sft" else args.rows,
            "filter_overlength_samples": True,
        },
        "post_training": settings,
        "training": {
            "output_dir": str(out),
            "max_steps": SFT_STEPS if method == "sft" else args.steps,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-4 if method == "sft" else args.rate,
            "warmup_steps": 0,
            "max_seq_length": LONGEST,
            "max_prompt_length": LONGEST * 2 // 3,
            "max_completion_length": LONGEST // 3,
            "logging_steps": 1,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            **training,
        },
        "finetuning": {"load_best_model_at_end": False, "early_stopping_patience": None},
    }
    path = out / "run.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def chosen_rows(method: str, model: Path, args: argparse.Namespace) -> Path:
    """The training rows that fit, whole steps of them, as a file."""
    name = "kto_unpaired" if method == "kto" else "hh_helpful"
    source, chosen = args.data / f"{name}.train.jsonl", args.out / f"{name}.train.jsonl"
    if not chosen.is_file():
        config = strop.load_config(write_config(method, model, source, args.out / "choice", args))
        places = sorted(group.origin.line for group in prepare(config, config.models[0]).data.train)
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = places[: len(places) // BATCH * BATCH]
        chosen.write_text("".join(lines[place - 1] for place in kept), encoding="utf-8")
    return chosen


def run_strop(config: Path) -> Path:
    """Through the command line; the run's folder."""
    subprocess.run(
        [sys.executable, "-m", "strop", "train", "--config", str(config), "--overwrite"],
        check=True,
        capture_output=True,
    )
    return config.parent / "model"


def records(run: Path, split: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def held_out(record: dict[str, Any]) -> dict[str, float]:
    return {key: round(record[key], 4) for key in SHOWN if key in record}


def judge(method: str, model: Path, start: Path, rows: Path, out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Held-out metrics of `model`, whose reference is `start`: the evaluation before a first step of no length."""
    config = write_config(method, model, rows, out, args, max_steps=1, learning_rate=1e-30)
    if "use_ref_model" in METHODS[settings_of(method)["method"]].model_fields:
        text = json.loads(config.read_text(encoding="utf-8"))
        text["post_training"]["ref_model_id"] = str(start)
        config.write_text(json.dumps(text), encoding="utf-8")
    return held_out(records(run_strop(config), "eval")[0])


def as_text(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """A pair that ends where strop's does: TRL's older trainers would train what their template writes after the end
    token, and another end token."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    sides = {side: row[side][0]["content"] + tokenizer.eos_token for side in ("chosen", "rejected")}
    return {"prompt": prompt, **sides}


def trl_trainer(method: str, s: Any) -> tuple[Any, Any, dict[str, Any]]:
    """TRL's trainer for strop's settings `s`, the class of its own, and what these become."""
    import trl
    from trl.experimental import cpo, orpo

    name, _, loss = method.partition(":")
    makers: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": loss or "sigmoid"}),
        "ipo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "ipo"}),
        "kto": (trl.KTOTrainer, trl.KTOConfig, {}),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {}),
        "cpo": (cpo.CPOTrainer, cpo.CPOConfig, {"cpo_alpha": 1.0}),
        "simpo": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    }
    trainer_class, config_class, own = makers[name]
    if name == "simpo":
        own |= {"beta": s.simpo_beta, "simpo_gamma": s.simpo_beta * s.simpo_gamma}
    else:
        own |= {"beta": s.beta}
    return trainer_class, config_class, own


def run_trl(
    method: str, start: Path, train_rows: Path, out: Path, args: argparse.Namespace
) -> tuple[Path, list[float]]:
    from datasets import Dataset

    config = strop.load_config(write_config(method, start, train_rows, out, args))
    prepared = prepare(config, config.models[0])
    plan = prepared.plan
    rows = [json.loads(line) for line in train_rows.read_text(encoding="utf-8").splitlines()]
    places = [prepared.data.train[i].origin.line - 1 for s in range(1, plan.num_steps + 1) for i in plan.groups(s)]
    trainer_class, config_class, own = trl_trainer(method, config.post_training)
    given = config_class(
        output_dir=str(out / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=args.rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=SEED,
        max_length=LONGEST,
        train_sampling_strategy="sequential",
        **own,
    )

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(start, dtype="float32")

    tokenizer = AutoTokenizer.from_pretrained(start)
    name = method.partition(":")[0]
    if name in ("orpo", "simpo", "cpo"):
        rows = [as_text(row, tokenizer) for row in rows]
    reference = {"ref_model": load()} if name in ("dpo", "ipo", "kto") else {}
    trainer = trainer_class(
        model=load(),
        args=given,
        train_dataset=Dataset.from_list([rows[i] for i in places]),
        processing_class=tokenizer,
        **reference,
    )
    trainer.train()
    trainer.save_model(str(out / "trl"))
    return out / "trl", [r["loss"] for r in trainer.state.log_history if "loss" in r]


def ends(losses: list[float]) -> list[float]:
    tenth = max(1, len(losses) // 10)
    return [round(mean(losses[:tenth]), 4), round(mean(losses[-tenth:]), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "sft"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=500, help="rows to choose from; those that fit are met repeatedly")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--trl", action="store_true")
    args = parser.parse_args()
    start = args.out / "sft" / "model" / "final"
    if not start.is_dir():
        run_strop(write_config("sft", args.base, args.data / "instruct_sft.train.jsonl", args.out / "sft", args))
    for method in args.methods:
        out = args.out / method.replace(":", "-")
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        rows = chosen_rows(method, start, args)
        run = run_strop(write_config(method, start, rows, out, args))
        evaluations = records(run, "eval")
        row: dict[str, Any] = {
            "method": method,
            "side": "strop",
            "train": ends([r["loss"] for r in records(run, "train")]),
            "before": held_out(evaluations[0]),
            "after": held_out(evaluations[-1]),
            "seconds": round(time.perf_counter() - began),
        }
        print("RESULT " + json.dumps(row), flush=True)
        if args.trl:
            began = time.perf_counter()
            model, losses = run_trl(method, start, rows, out, args)
            row = {
                "method": method,
                "side": "trl",
                "train": ends(losses),
                "seconds": round(time.perf_counter() - began),
            }
            row["after"] = judge(method, model, start, rows, out / "judged", args)
            print("RESULT " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
