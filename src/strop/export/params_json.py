"""`params.json` and config.json: one model's configuration as the two layouts have it. Floor 6."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, LlamaConfig, MistralConfig, PreTrainedConfig

from strop.errors import ModelError, foreign_errors
from strop.export.layout import EMBEDDING, FAMILIES, HEAD, Layout
from strop.policy.model.consolidated_files import PARAMS
from strop.policy.model.folder_safety import check_numbers
from strop.policy.model.shard_writer import Spec
from strop.readable import short_name

OURS = "hf_config"
SMALL_WIDTH = 3072
"""The text models of Llama 3.2 are at most this wide. Their positions are stretched by 32, those of 3.1 and 3.3 by 8,
and Meta's keys do not say it."""


def layout_of(config: PreTrainedConfig, where: str) -> Layout:
    """How the weights of a model of this configuration lie.

    Raises:
        ModelError: it is of another family.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"its family is {family}, which has no consolidated layout here",
            where=where,
            expected=f"one of {', '.join(FAMILIES)}",
            fix="use the folder as it is: transformers, vLLM and llama.cpp read that layout",
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Layout(family, heads, config.num_key_value_heads or heads, head_dim)


def params_of(config: PreTrainedConfig, written: Mapping[str, Any]) -> dict[str, Any]:
    """params.json of a model: Meta's keys, and its config.json beside them. written: config.json as it is."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": layout_of(config, "").head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "use_scaled_rope": rope.get("rope_type", "default") == "llama3",
        OURS: dict(written),
    }


def config_of(params: Mapping[str, Any], specs: Mapping[str, Spec], *, tied: bool, where: str) -> PreTrainedConfig:
    """The configuration that params.json describes.

    Args:
        specs: of the model's tensors, by consolidated name: Meta's keys do not give all sizes.
        tied: whether the head is the embedding.

    Raises:
        ModelError: it describes no model of these families.
    """
    written = params.get(OURS)
    fix = f"use the {PARAMS} and the weights of one and the same model"
    with foreign_errors(lambda why: ModelError(f"{PARAMS} does not describe a model: {why}", where=where, fix=fix)):
        if isinstance(written, dict):
            check_numbers(written, where)
            config = CONFIG_MAPPING[written["model_type"]].from_dict(copy.deepcopy(written))
        else:
            config = _from_keys(params, specs)
            config.tie_word_embeddings = tied
    layout_of(config, where)
    return config


def _from_keys(params: Mapping[str, Any], specs: Mapping[str, Spec]) -> PreTrainedConfig:
    width, heads, theta = int(params["dim"]), int(params["n_heads"]), float(params.get("rope_theta", 10000.0))
    is_mistral = "sliding_window" in params or ("hidden_dim" in params and "multiple_of" not in params)
    scaled = bool(params.get("use_scaled_rope"))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaled:
        factor = 32.0 if width <= SMALL_WIDTH else 8.0
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    positions = 131_072 if scaled else 8192 if theta >= 500_000 else 32_768 if is_mistral else 4096
    settings: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": int(params["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "head_dim": int(params.get("head_dim") or width // heads),
        "intermediate_size": specs["layers.0.feed_forward.w1.weight"].shape[0],
        "vocab_size": specs[EMBEDDING].shape[0],
        "rms_norm_eps": float(params.get("norm_eps", 1e-5)),
        "max_position_embeddings": positions,
        "rope_parameters": rope,
        "dtype": short_name(specs.get(HEAD, specs[EMBEDDING]).dtype),
    }
    if is_mistral:
        settings["sliding_window"] = params.get("sliding_window")
        return MistralConfig(**settings, architectures=["MistralForCausalLM"])
    return LlamaConfig(**settings, architectures=["LlamaForCausalLM"])
