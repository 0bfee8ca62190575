"""A tiny model of a family that learns eight answers by heart, and what it says when it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import strop
from oracle.families import Family

ANSWERS = {
    "Which animal jumps?": "The fox.",
    "Over what does it jump?": "Over the lazy dog.",
    "What colour is it?": "Brown.",
    "How often?": "Again and again.",
    "Is it slow?": "No, it is quick.",
    "Say hello.": "Hello!",
    "What is 2 + 2?": "4",
    "What comes behind 8?": "9, then 10.",
}

ALOUD = ("deepseek",)
"""Families whose generation prompt opens a thought that the template reads from the content alone."""

THINKING = ("nemotron", "qwen3_5_think", "qwen3_6", "qwen3_8", "gptoss", "glm4moe", "muse_glimmer")
"""Families that are tuned on rows with reasoning."""


def rows(family: Family) -> list[dict[str, Any]]:
    """Eight conversations, as people have them for this family."""
    made = []
    for question, answer in ANSWERS.items():
        thought = "I know it."
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if family.name.startswith(ALOUD):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        elif family.name.startswith(THINKING):
            message["reasoning_content"] = thought
        made.append({"messages": [{"role": "user", "content": question}, message]})
    return made


def base_model(family: Family, folder: Path, stops: Sequence[str]) -> None:
    """Writes a random model of the family, whose generation stops at `stops`."""
    tokenizer = family.tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(stops[0]),
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)


def learn(folder: Path, made: Sequence[Mapping[str, Any]], **sections: Mapping[str, Any]) -> Path:
    """Trains the model in `folder / "base"` on the rows, by a configuration file; returns the folder of the result."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    config: dict[str, Any] = {
        "models": [{"name": "talker", "huggingface_id": str(folder / "base")}],
        "dataset": {"train_file": str(folder / "rows.jsonl"), "validation_split": 0.0, "num_workers": 1},
        "post_training": {"method": "sft"},
        "lora": {"enabled": False},
        "training": {
            "output_dir": str(folder / "out"),
            "learning_rate": 5e-3,
            "warmup_steps": 5,
            "max_steps": 120,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_seq_length": 4096,
            "max_prompt_length": None,
            "save_steps": 1000,
        },
        "logging": {"report_to": []},
    }
    for name, values in sections.items():
        config.setdefault(name, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (result,) = strop.train(folder / "config.yaml")
    return Path(result.final)


class Talker:
    """Plain transformers, with what stands in a run's folder `final`."""

    def __init__(self, final: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(final)
        self._model = AutoModelForCausalLM.from_pretrained(final)

    def answer(self, messages: Sequence[Mapping[str, Any]], *, most: int = 100) -> tuple[str, bool]:
        """What it generates behind the template's own generation prompt, and whether it stops by itself."""
        prompt = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = self._model.generate(**prompt, max_new_tokens=most, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return str(self._tokenizer.decode(ids)), len(ids) < most
