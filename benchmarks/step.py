"""Seconds a pair of DPO training, strop beside TRL, on random weights and synthetic lengths.

    python benchmarks/step.py [--rounds 3] [--pairs 16] [--lora] [--bf16] [--prompt 190 --chosen 280 --rejected 250]

Same model, rows, order, dtype, optimizer and effective batch; dropout 0. Reference passes are counted on both sides.
TRL runs with gradient checkpointing off and its reference precomputed: its best flags. Rounds alternate, so
that a busy machine slows both; medians and their ratio are printed, and each side's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
BATCH = 4
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """A random Llama, a word-level tokenizer and rows whose lengths are log-normal around the means."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, SHAPE["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    random = np.random.default_rng(0)

    def text(mean: int) -> str:
        n = int(np.clip(random.lognormal(np.log(mean), 0.4), 4, 1000))
        return " " + " ".join(f"w{i}" for i in random.integers(3, SHAPE["vocab_size"], n))

    means = {"prompt": args.prompt, "chosen": args.chosen, "rejected": args.rejected}
    rows = [{name: text(mean) for name, mean in means.items()} for _ in range(args.pairs)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def strop_side(folder: Path, args: argparse.Namespace) -> None:
    import strop

    strop.train(
        strop.load_config(
            overrides={
                "models": [{"huggingface_id": str(folder)}],
                "dataset": {"train_file": str(folder / "rows.jsonl"), "validation_split": 0.0, "render": "raw"},
                "post_training": {"method": "dpo"},
                "training": {
                    "output_dir": str(folder / "strop"),
                    "per_device_train_batch_size": BATCH,
                    "gradient_accumulation_steps": 1,
                    "learning_rate": 1e-5,
                    "warmup_steps": 0,
                    "max_seq_length": 2048,
                    "max_prompt_length": None,
                    "max_completion_length": None,
                    "bf16": args.bf16,
                },
                **({"lora": LORA} if args.lora else {}),
            }
        ),
        overwrite=True,
    )


def trl_side(folder: Path, args: argparse.Namespace) -> None:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=1e-5,
        max_length=2048,
        bf16=args.bf16,
        use_cpu=True,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    DPOTrainer(
        model=model(),
        ref_model=None if args.lora else model(),
        args=settings,
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if args.lora else None,
    ).train()


def measure(side: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One whole training of one side in a process of its own, its imports and its loading left out of the time."""
    command = [sys.executable, __file__, *args.given, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def run_side(args: argparse.Namespace) -> None:
    import torch
    import transformers  # noqa: F401 (imported before the clock starts)

    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    {"strop": strop_side, "trl": trl_side}[args.side](args.folder, args)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds_a_pair": seconds / args.pairs, "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rounds", 3),
        ("pairs", 16),
        ("threads", 2),
        ("prompt", 190),
        ("chosen", 280),
        ("rejected", 250),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--side", choices=("strop", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.given = sys.argv[1:]
    if args.side:
        return run_side(args)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder, args)
        found: dict[str, list[dict[str, float]]] = {"strop": [], "trl": []}
        for number in range(args.rounds):
            for side, measured in found.items():
                measured.append(measure(side, folder, args))
                print(f"round {number + 1}: {side} {measured[-1]['seconds_a_pair']:.3f} s a pair", flush=True)
    seconds = {s: statistics.median(m["seconds_a_pair"] for m in ms) for s, ms in found.items()}
    peak = {s: statistics.median(m["peak_gib"] for m in ms) for s, ms in found.items()}
    print(
        f"seconds a pair: strop {seconds['strop']:.3f}, TRL {seconds['trl']:.3f}: "
        f"{seconds['trl'] / seconds['strop']:.2f} x"
    )
    print(f"peak GiB: strop {peak['strop']:.2f}, TRL {peak['trl']:.2f}: {peak['strop'] / peak['trl']:.2f} of TRL")
    return None


if __name__ == "__main__":
    main()
