"""unsloth's scripts, and the configuration of OpenSloth, which is built on it. Floor 2, no torch.

Facts: unsloth's FastLanguageModel, and OpenSloth's `opensloth_config`. What these do not have of their own is TRL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from strop.importers import trl
from strop.importers.key_answers import (
    KeyAnswer,
    Rules,
    View,
    absent,
    always,
    carried,
    idle,
    is_on,
    left,
    listed,
    off,
    only,
    packing,
    straight,
    translated,
)

ALL_LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def defaults(method: str, given: Mapping[str, Any], folder_type: str) -> Mapping[str, Any]:
    """What unsloth takes for names that are not given: 4 bits, and its own for adapters."""
    found = {
        **trl.defaults(method, given, folder_type),
        "use_bnb_nested_quant": True,
    }
    if "load_in_4bit" not in given and not is_on(given.get("load_in_8bit")) and not is_on(given.get("full_finetuning")):
        found["load_in_4bit"] = True
    if not is_on(given.get("full_finetuning")):
        found |= {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": ALL_LAYERS}
    return found


def decided(view: View) -> Iterator[tuple[str, Any]]:
    """As TRL's; adapters train unless everything does."""
    yield "lora.enabled", not is_on(view.given.get("full_finetuning"))
    yield from trl.decided(view)


def method_of_opensloth(given: Mapping[str, Any], calls: tuple[str, ...]) -> str:
    """`training_type`, which is sft where it is not given."""
    return str(given.get("training_type", "dpo" if "DPOArgs" in calls else "sft"))


def defaults_of_opensloth(method: str, given: Mapping[str, Any], folder_type: str) -> Mapping[str, Any]:
    """What OpenSloth takes for names that are not given."""
    return {
        **defaults(method, given, folder_type),
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-4,
        "gradient_accumulation_steps": 4,
        "logging_steps": 1,
        "num_train_epochs": 3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "save_total_limit": 2,
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "lora_r": 8,
        "lora_alpha": 16,
        "max_seq_length": 4096,
        "sequence_packing": True,
        "filter_overlength_samples": True,
        "log_level": "info",
        "report_to": "tensorboard",
    }


def _random_state(value: Any, view: View) -> KeyAnswer:
    return idle("seed decides the weights of adapters too")


def _cache(value: Any, view: View) -> KeyAnswer:
    return translated(
        {"dataset.name": value},
        "it must hold rows as they were before tokenisation: prompt, chosen, rejected, or messages",
    )


def _full(value: Any, view: View) -> KeyAnswer:
    return translated({"lora.enabled": False}) if is_on(value) else idle("adapters train")


RULES: Rules = {
    **trl.RULES,
    "dtype": lambda value, view: idle("chosen by the device") if value is None else left("training.bf16 says it"),
    "full_finetuning": _full,
    "random_state": _random_state,
    "use_gradient_checkpointing": lambda value, view: translated(
        {"training.gradient_checkpointing": is_on(value) or value == "unsloth"}
    ),
    "loftq_config": off("adapters begin as plain LoRA does"),
    "layers_to_transform": off("adapters are in all layers; name modules in lora.target_modules"),
    "fast_inference": off("it samples with the policy's own weights"),
    "device_map": off("gpu.device_ids names the devices"),
    "token": off("put it into the environment, as HF_TOKEN"),
    "max_lora_rank": always("adapters have the rank lora.r"),
    "gpu_memory_utilization": always("micro-batches are chosen so that they fit"),
    "finetune_vision_layers": off("strop tunes language models"),
    "finetune_language_layers": only((True,), "they train", "name modules in lora.target_modules"),
    "finetune_attention_modules": only((True,), "they train", "name modules in lora.target_modules"),
    "finetune_mlp_modules": only((True,), "they train", "name modules in lora.target_modules"),
}
OPENSLOTH: Rules = {
    **RULES,
    **straight("pretrained_lora filter_overlength_samples"),
    "training_type": lambda value, view: (
        carried("post_training.method", value) if value == view.method else left("another method is given")
    ),
    "data_cache_path": _cache,
    "devices": lambda value, view: (
        translated({"gpu.device_ids": value}) if value != [0] else idle("the first GPU is the default")
    ),
    "sequence_packing": packing,
    "lora_target_modules": listed("lora.target_modules"),
    **absent("wandb_project", "numbers are in metrics.jsonl"),
}
