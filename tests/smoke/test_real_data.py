"""Real rows and real tokenizers on a small Llama with random weights: what is left loads and generates elsewhere."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import strop
from strop.runfiles import RUN_FILES

NUM_ROWS = 40
STEPS = 3
TOKENIZERS = {"gpt2": None, "mistral-v3-32k": "tokenizer", "mistral-tekken-131k": "tokenizer"}
"""Name -> which template its rows are rendered by; null: the tokenizer has none."""
DATA = {"sft": "instruct_sft.train.jsonl", "dpo": "hh_helpful.train.jsonl"}
RUNS = [("sft", "full", "fp32"), ("sft", "lora", "bf16"), ("dpo", "lora", "fp32"), ("dpo", "full", "bf16")]
WHERE_THERE_IS_CAUSE = {
    "rejected.jsonl",
    "pairs.json",
    "failure.json",
    "rollouts.jsonl",
    "forecast.json",
    "samples.jsonl",
    "trackers.json",
}
"""Files that only some runs leave: these have no refused rows, failure, drawn completions, samples or trackers."""
PAPERS = set(RUN_FILES) - WHERE_THERE_IS_CAUSE
PAPERS |= {"logs", "final", f"checkpoint-{STEPS}"}


@pytest.fixture(scope="module")
def models(shared: Path, tmp_path_factory: Any, make_model: Callable[..., Any]) -> dict[str, Path]:
    """A model folder for each tokenizer."""
    folders = {}
    for name in TOKENIZERS:
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        folders[name] = tmp_path_factory.mktemp("models") / name
        vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        make_model(tie_word_embeddings=True, **vocabulary).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def train(shared: Path, model: Path, output: Path, method: str, weights: str, precision: str) -> Path:
    overrides: dict[str, Any] = {
        "models.0.huggingface_id": str(model),
        "models.0.name": "run",
        "dataset.train_file": str(shared / "data" / DATA[method]),
        "dataset.max_samples": NUM_ROWS,
        "post_training.method": method,
        "training.output_dir": str(output),
        "training.max_steps": STEPS,
        "training.gradient_accumulation_steps": 2,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 0,
        "training.max_seq_length": 128,
        "training.logging_steps": 1,
        "training.bf16": precision == "bf16",
    }
    if weights == "lora":
        overrides["lora.r"] = 4
    (result,) = strop.train(strop.load_config(overrides=overrides))
    return result.run_dir


LARGEST = "mistral-tekken-131k"
"""Reading it takes seconds, several times in a run: the suite encodes with it alone (test_rows_of_b.py)."""
OFTEN: dict[str, tuple[int, ...]] = {"gpt2": (0, 1), "mistral-v3-32k": (2, 3), LARGEST: ()}
"""Which of RUNS the suite makes with a tokenizer: all of them; `make nightly` makes all with each."""
CASES = [
    pytest.param(name, *run, id="-".join((name, *run)), marks=() if i in OFTEN[name] else pytest.mark.nightly)
    for name in TOKENIZERS
    for i, run in enumerate(RUNS)
]


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "method", "weights", "precision"), CASES)
def test_a_run_leaves_a_model_that_generates(
    name: str, method: str, weights: str, precision: str, shared: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    run = train(shared, models[name], tmp_path, method, weights, precision)
    assert {p.name for p in run.iterdir()} - {".lock", "pairs.json"} == PAPERS
    check_data(run, name)
    check_metrics(run, method, precision)
    check_final(run / "final", models[name], weights)


def check_data(run: Path, name: str) -> None:
    data = json.loads((run / "data.json").read_text())
    splits = data["splits"].values()
    assert sum(split["kept"] for split in splits) == NUM_ROWS
    assert all(split["refused"] == {} and split["dropped"] == {} for split in splits)
    assert data["rendering"]["template"] == (TOKENIZERS[name] or "plain")
    assert data["rendering"]["num_chat"] == NUM_ROWS


def check_metrics(run: Path, method: str, precision: str) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["split"], r["step"]) for r in records] == [
        ("eval", 0), *(("train", step) for step in range(1, STEPS + 1)), ("eval", STEPS),
    ]  # fmt: skip
    assert all(math.isfinite(r["loss"]) for r in records)
    assert records[0]["loss"] != records[-1]["loss"]
    if method == "dpo":
        assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5 if precision == "fp32" else 1e-3)
        margins = (run / "logs" / "margins" / "margins_log.jsonl").read_text().splitlines()
        assert len(margins) == STEPS


def check_final(final: Path, model: Path, weights: str) -> None:
    """With plain transformers and peft, which know nothing of strop."""
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if weights == "lora":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated property
            module = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), final)
        changed = [p for n, p in module.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    else:
        module = AutoModelForCausalLM.from_pretrained(final)
        before = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
        changed = [p for n, p in module.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = module.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert generated.shape[1] == ids["input_ids"].shape[1] + 1
