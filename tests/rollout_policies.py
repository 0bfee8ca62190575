"""Tiny policies that sample, and prompts for them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from conftest import WITH_ENDS, build_model, build_tokenizer
from strop.config import load_config, resolve
from strop.policy.build import build_policy
from strop.policy.policy import Policy
from strop.rollout.sampler import Prompt, Sampled
from strop.types import Completion, Group, Origin

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": lambda: build_model(),
    "sliding": lambda: MistralForCausalLM(MistralConfig(**WITH_ENDS, sliding_window=6)),
    "mixture": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**WITH_ENDS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "hybrid": lambda: Lfm2ForCausalLM(
        Lfm2Config(**{**WITH_ENDS, "block_ff_dim": 48, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1]})
    ),
}
PROMPTS = [[5, 6, 7], [9] * 9, [11, 12, 13, 14, 15], [20, 21, 22], list(range(30, 47))]


def make_policy(folder: Path, family: str = "dense", **keys: Any) -> Policy:
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder / family)
    build_tokenizer().save_pretrained(folder / family)
    overrides = {
        "models.0.huggingface_id": str(folder / family),
        "method": "sft",
        "training.max_seq_length": 64,
        **keys,
    }
    config = resolve(load_config(overrides=overrides))
    return build_policy(config, config.models[0], torch.device("cpu"), tokenizer=build_tokenizer())


def prompts(of: list[list[int]] = PROMPTS, room: int = 12) -> list[Prompt]:
    return [Prompt(number, ids, room) for number, ids in enumerate(of)]


def as_group(prompt: Prompt, completions: list[Sampled]) -> Group:
    made = tuple(Completion(c.ids, b"\1" * len(c.ids)) for c in completions)
    return Group(array("i", prompt.ids), made, Origin("rows", 1))


def trained_logps(policy: Policy, given: list[Prompt], found: list[list[Sampled]]) -> torch.Tensor:
    """As the training forward has them."""
    return policy(policy.collate([as_group(p, own) for p, own in zip(given, found, strict=True)])).logps.detach()
