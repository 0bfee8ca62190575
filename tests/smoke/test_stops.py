"""From training to talking: a base model that learnt answers says them from its template's prompt by plain `generate`
from `final/`, and stops by itself, though it did not stop at the end of a turn before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import strop

ANSWERS = {"one": "hello world", "two": "no maybe yes", "three": "The quick brown fox"}


@pytest.mark.share(1)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_trained_model_says_its_answers_and_stops(
    lora: bool,
    tmp_path: Path,
    make_model: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    base, tokenizer = tmp_path / "base", make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    make_model(eos_token_id=1, hidden_size=64).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys: dict[str, Any] = {
        "models.0.name": "run",
        "models.0.huggingface_id": str(base),
        "dataset.train_file": str(tmp_path / "rows.jsonl"),
        "dataset.validation_split": 0.0,
        "post_training.method": "sft",
        "lora.enabled": lora,
        "lora.r": 16,
        "lora.lora_dropout": 0.0,
        "lora.target_modules": "all-linear",
        "training.output_dir": str(tmp_path / "out"),
        "training.num_epochs": 60,
        "training.per_device_train_batch_size": 3,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 1e-2,
        "training.lr_scheduler": "constant",
        "training.warmup_steps": 0,
        "training.save_steps": 1000,
    }
    (result,) = strop.train(strop.load_config(overrides=keys))
    read = AutoTokenizer.from_pretrained(result.final)
    assert read.eos_token == "<|im_end|>"
    if lora:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.final)).eval()
        settings = GenerationConfig.from_pretrained(result.final)
    else:
        model = AutoModelForCausalLM.from_pretrained(result.final).eval()
        settings = model.generation_config
    assert settings.eos_token_id == [1, 3]
    settings.max_new_tokens = 40
    for question, answer in ANSWERS.items():
        chat = [{"role": "user", "content": question}]
        prompt = read.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**prompt, generation_config=settings, do_sample=False)
        written = out[0, prompt["input_ids"].shape[1] :].tolist()
        assert read.decode(written) == f"{answer}<|im_end|>"
