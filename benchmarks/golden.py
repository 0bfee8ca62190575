"""Whether two commits train the same bits: every method, in many cuts, from tiny models made here.

    python -m benchmarks.golden --against COMMIT

The runs are made by the code of this tree and by that of COMMIT (checked out beside it, for as long as it takes), each
in a process of its own with one thread, and compared record by record: losses, norms of gradients, all other metrics,
margins, and the bytes of the final weights. Only what both accept is compared; what one refuses is a difference.
Differences are listed; the exit code is 1 where there are any. `--only TEXT` takes the runs whose name has TEXT in it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(90)]
TIMES = ("seconds", "tokens_per_second", "peak_memory_gib", "time/")
SMALL_CUT = 60
"""Tokens of a micro-batch: about two groups of these rows."""
RECIPE: dict[str, Any] = {
    "models.0.name": "run",
    "dataset.validation_split": 0.25,
    "training.max_steps": 4,
    "training.per_device_train_batch_size": 4,
    "training.gradient_accumulation_steps": 2,
    "training.learning_rate": 5e-3,
    "training.warmup_steps": 0,
    "training.logging_steps": 1,
    "training.eval_steps": 2,
    "training.save_steps": 100,
    "training.max_seq_length": 48,
    "training.reference_store": False,
    "finetuning.load_best_model_at_end": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "sft by sequences": {"method": "sft", "loss_reduction": "sequences"},
    "dpo": {"method": "dpo"},
    "dpo whole step": {"method": "dpo", "loss_type": "kto_pair"},
    "ipo": {"method": "ipo"},
    "kto": {"method": "kto"},
    "orpo": {"method": "orpo"},
    "orpo full": {"method": "orpo", "orpo_nll": "full"},
    "simpo": {"method": "simpo"},
    "cpo": {"method": "cpo"},
}
"""One of each kind of objective: these go through every cut, dtype and way to train."""
DPO_LOSSES = (
    *("hinge", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
LOSSES: dict[str, dict[str, Any]] = {
    **{f"dpo {loss}": {"method": "dpo", "loss_type": loss} for loss in DPO_LOSSES},
    "dpo exo": {"method": "dpo", "loss_type": "exo_pair", "label_smoothing": 1e-3},
    "dpo with sft": {"method": "dpo", "sft_weight": 0.5, "label_smoothing": 0.1},
    "dpo js": {"method": "dpo", "f_divergence": "js"},
    "dpo ld": {"method": "dpo", "ld_alpha": 0.5},
    "dpo wpo": {"method": "dpo", "wpo_weighting": True},
    "kto apo": {"method": "kto", "kto_loss": "apo_zero_unpaired"},
    "distill": {"method": "distill"},
    "distill forward": {"method": "distill", "beta": 0.0, "temperature": 0.8},
    "distill reverse": {"method": "distill", "beta": 1.0},
}
ALGORITHMS = (*("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "gmpo", "rloo", "reinforce++", "maxrl"),)


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and keys of every run."""
    for kind, method in KINDS.items():
        for way in ("lora", "full"):
            for dtype in ("float32", "bfloat16"):
                for cut in ("one micro-batch", "several"):
                    keys: dict[str, Any] = {f"post_training.{k}": v for k, v in method.items()}
                    keys["lora.enabled"] = way == "lora"
                    keys["training.bf16"] = dtype == "bfloat16"
                    keys["training.micro_batch_tokens"] = 4096 if cut == "one micro-batch" else SMALL_CUT
                    if way == "lora":
                        keys["lora.lora_dropout"] = 0.1
                    yield f"{kind}, {way}, {dtype}, {cut}", keys
    for loss, method in LOSSES.items():
        yield loss, {f"post_training.{k}": v for k, v in method.items()} | {"training.micro_batch_tokens": SMALL_CUT}
    for name, more in {
        "layers checkpointed": {"training.gradient_checkpointing": True},
        "reference that follows": {"lora.enabled": False, "post_training.ref_sync_steps": 2},
        "tiny epochs": {"training.per_device_train_batch_size": 5, "training.max_steps": 9},
    }.items():
        yield name, {"post_training.method": "dpo", "training.micro_batch_tokens": SMALL_CUT, **more}
    yield "rows filled", {"post_training.method": "sft", "training.packing": True, "training.max_seq_length": 96}
    for algorithm in ALGORITHMS:
        for beta in (0.0, 0.1):
            keys = {f"post_training.{k}": v for k, v in (("method", "grpo"), ("algorithm", algorithm), ("beta", beta))}
            yield f"grpo {algorithm}, beta {beta}", {**keys, "training.micro_batch_tokens": SMALL_CUT}
    sampled = {"post_training.method": "grpo", "training.max_completion_length": 12, "rollout.num_generations": 3}
    for name, more in {
        "grpo sampled": {},
        "grpo sampled in rounds": {"rollout.steps_per_generation": 2, "rollout.num_iterations": 2},
        "grpo sampled with a reference": {"post_training.beta": 0.1, "lora.enabled": True, "rollout.temperature": 0.8},
        "grpo sampled and refilled": {"rollout.dynamic_sampling": True, "rollout.max_refills": 2},
    }.items():
        yield name, {**sampled, "training.micro_batch_tokens": SMALL_CUT, **more}
    for kind in ("dpo", "sft"):
        yield f"{kind}, plain rows", {"post_training.method": kind, "models.0.huggingface_id": "plain"}


def write_inputs(folder: Path) -> None:
    """A model of each kind of rows, and data of each shape."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<eos>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=128
    )
    torch.manual_seed(1)
    sizes = {"vocab_size": len(words), "eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    llama = LlamaConfig(
        **sizes,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    gpt2 = GPT2Config(**sizes, n_embd=48, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1)
    kinds = {"shared": LlamaForCausalLM(llama), "plain": GPT2LMHeadModel(gpt2), "teacher": LlamaForCausalLM(llama)}
    for name, model in kinds.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(2)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    pairs = [{"prompt": text(3, 14), "chosen": " " + text(1, 12), "rejected": " " + text(1, 12)} for _ in range(48)]
    draw = random.Random(3)
    groups = [
        {
            "prompt_ids": [words.index(word) for word in p["prompt"].split()],
            "completion_ids": [[draw.randrange(3, 90) for _ in range(draw.randint(1, 9))] + [2] for _ in range(4)],
            "rewards": [draw.random() for _ in range(4)],
        }
        for p in pairs
    ]
    for group in groups:
        group["old_logps"] = [[-4.5 + draw.random() for _ in ids] for ids in group["completion_ids"]]
    (folder / "rewards.py").write_text(
        "def first(completions):\n    return [float('w1' in text) for text in completions]\n"
    )
    rows = {
        "groups": groups,
        "pairs": pairs,
        "sft": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs],
        "kto": [{"prompt": p["prompt"], "completion": p["chosen"], "label": draw.random() < 0.5} for p in pairs],
    }
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))


def result(folder: Path) -> dict[str, Any]:
    """What a run left, as text that shows every bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    digest = hashlib.sha256()
    for path in sorted((folder / "final").glob("*.safetensors")):
        digest.update(path.read_bytes())
    margins = {
        path.relative_to(folder).as_posix(): path.read_bytes().hex()
        for path in sorted(folder.glob("logs/margins/**/*.npy"))
    }
    records = [{k: repr(v) for k, v in sorted(line.items()) if not k.startswith(TIMES)} for line in lines]
    return {"records": records, "final": digest.hexdigest(), "margins": margins}


def train_all(inputs: Path, only: str) -> dict[str, Any]:
    """Every run by the `strop` that is imported."""
    import torch

    import strop
    from strop.errors import StropError

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for number, (name, keys) in enumerate(runs()):
        if only not in name:
            continue
        method = keys["post_training.method"]
        is_sampled = any(key.startswith("rollout.") for key in keys)
        data = {"sft": "sft", "kto": "kto", "distill": "sft", "grpo": "groups"}.get(method, "pairs")
        if is_sampled:
            keys["rewards"], data = [f"{inputs / 'rewards.py'}:first"], "sft"
        if method == "distill":
            keys["post_training.teacher_model_id"] = str(inputs / "teacher")
        model = inputs / keys.pop("models.0.huggingface_id", "shared")
        overrides = {
            **RECIPE,
            "models.0.huggingface_id": str(model),
            "dataset.train_file": str(inputs / f"{data}.jsonl"),
            "training.output_dir": str(inputs.parent / f"out-{os.getpid()}-{number}"),
            **keys,
        }
        try:
            (run,) = strop.train(strop.load_config(overrides=overrides))
        except StropError as error:
            found[name] = {"refused": str(error.found)}
        else:
            found[name] = result(Path(run.run_dir))
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for each run that is not the same."""
    for name in before:
        old, new = before[name], now[name]
        if "refused" in old or "refused" in new:
            yield f"{name}: {old.get('refused', 'trained')} then, {new.get('refused', 'trained')} now"
            continue
        if len(old["records"]) != len(new["records"]):
            yield f"{name}: {len(old['records'])} records then, {len(new['records'])} now"
            continue
        apart = [
            f"{a['split']} step {a['step']} {key} {a[key]} then, {b.get(key)} now"
            for a, b in zip(old["records"], new["records"], strict=True)
            for key in a
            if a[key] != b.get(key)
        ]
        if old["final"] != new["final"]:
            apart.append("final weights differ")
        if old["margins"] != new["margins"]:
            apart.append("margins differ")
        if apart:
            yield f"{name}: {len(apart)} differ, the first: {apart[0]}; the last: {apart[-1]}"


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name has TEXT in it")
    parser.add_argument("--train", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print("\n" + json.dumps(train_all(Path(args.train), args.only)))
        return 0
    if not args.against:
        parser.error("--against is missing")
    with tempfile.TemporaryDirectory() as work, checked_out(args.against) as tree:
        inputs = Path(work) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        results = []
        for source in (tree, ROOT):
            environment = os.environ | {
                "PYTHONPATH": str(source / "src"),
                "OMP_NUM_THREADS": "1",
                "STROP_CACHE": f"{work}/cache",  # both compute products by the rates that one of them has measured
                "HF_HUB_OFFLINE": "1",
            }
            command = [sys.executable, __file__, "--train", str(inputs), "--only", args.only]
            made = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=work)
            results.append(json.loads(made.stdout.splitlines()[-1]))
        before, now = results
    listed = list(differences(before, now))
    print(*listed, sep="\n")
    refused = sum("refused" in run for run in now.values())
    print(f"{len(now)} runs, {refused} of them refused, {len(listed)} differ from {args.against}")
    return 1 if listed else 0


if __name__ == "__main__":
    sys.exit(main())
