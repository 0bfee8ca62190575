"""Peak memory of DPO with LoRA on a base in 4 bits (NF4), beside the same base in bf16, by strop and by TRL.

    python -m benchmarks.quantised [--out benchmarks/results/quantised.json]

The model is made here, with random weights; the rows are the same for all. Every side is a process of its own with one
thread. What is compared is the memory that a process has at its peak (polled 50 times per second) beyond what it has
once its packages are imported: all that is resident, and the part of it that is no file. A frozen base in bf16 is read
from its file as it is used, so it is resident and no memory of the process's own; one in 4 bits is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "results" / "quantised.json"
SIZES: dict[str, int] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
STEPS, PAIRS, WORDS = 3, 4, 24
"""Steps; pairs in each; words of an answer."""
SIDES = ("strop bf16", "strop 4bit", "TRL bf16", "TRL 4bit")


def make(folder: Path) -> int:
    """A Llama and its tokenizer, in bf16, and rows of pairs; how many weights it has."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(4093))]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), eos_token_id=1, pad_token_id=0, bos_token_id=None, **SIZES)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choice(words[3:]) for _ in range(count))

    rows = [{"prompt": f"{text(WORDS)} ", "chosen": text(WORDS), "rejected": text(WORDS)} for _ in range(STEPS * PAIRS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(weight.numel() for weight in model.parameters())


def resident_mib() -> tuple[float, float]:
    """Of this process: all, and what is no file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    total, anonymous = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
    return total, anonymous


def one_side(folder: Path, side: str) -> dict[str, float]:
    """Trains; what memory it took, in MiB."""
    import torch

    torch.set_num_threads(1)
    train = of_trl if side.startswith("TRL") else of_strop
    start = train(folder, "4bit" in side)
    before, stop = resident_mib(), threading.Event()
    peak = list(before)

    def watch() -> None:
        while not stop.wait(0.02):
            peak[:] = map(max, peak, resident_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    loss = start()
    stop.set()
    thread.join()
    total, anonymous = (most - first for most, first in zip(peak, before, strict=True))
    return {"peak": total, "anonymous": anonymous, "loss": loss}


def of_strop(folder: Path, four: bool) -> Any:
    import bitsandbytes  # noqa: F401 (as the other side has it before it begins)

    import strop
    from strop.training import train

    out = Path(tempfile.mkdtemp())
    config = strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(folder / "model"), "name": "run", "quant": "4bit" if four else "none"}],
            "dataset": {"train_file": str(folder / "rows.jsonl"), "validation_split": 0.0, "render": "raw"},
            "post_training": {"method": "dpo"},
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "training": {
                "output_dir": str(out),
                "per_device_train_batch_size": PAIRS,
                "gradient_accumulation_steps": 1,
                "max_steps": STEPS,
                "warmup_steps": 0,
                "max_seq_length": 128,
                "bf16": True,
                "gradient_checkpointing": False,
                "reference_store": False,
                "logging_steps": 1,
            },
        }
    )

    def start() -> float:
        train(config)
        lines = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
        return float(next(line["loss"] for line in lines if line["split"] == "train"))

    return start


def of_trl(folder: Path, four: bool) -> Any:
    import bitsandbytes  # noqa: F401
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]

    def start() -> float:
        how: dict[str, Any] = {}
        if four:
            settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            how["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings
            )
            how["device_map"] = {"": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, **how)
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=PAIRS,
                max_steps=STEPS,
                warmup_steps=0,
                learning_rate=5e-6,
                max_length=128,
                bf16=True,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
        )
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])

    return start


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For the page of results."""
    yield (
        f"{found['date']}, commit {found['commit']}, `python -m benchmarks.quantised`. DPO with LoRA (rank 16, all "
        f"linear layers) on a Llama of {found['weights'] / 1e6:.0f} million random weights, on a CPU with one thread: "
        f"{STEPS} steps of {PAIRS} pairs, bf16. Memory at its peak, without what the imports take: all that is "
        "resident, and what is no file. 4 bits: NF4, double quantisation.\n"
    )
    yield "| side | resident, MiB | to its bf16 | no file, MiB | loss of the first step |"
    yield "|---|---|---|---|---|"
    for side, own in found["sides"].items():
        ratio = own["peak"] / found["sides"][f"{side.split()[0]} bf16"]["peak"]
        yield f"| {side} | {own['peak']:.0f} | {ratio:.2f} | {own['anonymous']:.0f} | {own['loss']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one_side(options.folder, options.side)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as place:
        weights = make(Path(place))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STROP_CACHE": f"{place}/cache"}
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.quantised", "--side", side, "--folder", place]
            said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if said.returncode:
                sys.exit(f"{side}: {said.stderr[-2000:]}")
            found[side] = json.loads(said.stdout.splitlines()[-1])
            print(f"{side}: {found[side]}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip(),
        "weights": weights,
        "sides": found,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
