"""Where shared-prefix rows are right, and how that is checked on the loaded model. Floor 2.

Three gates: an allowlist of architectures whose only mixing of tokens is attention that goes through transformers'
interface and hands keywords on (each is tested); settings of one model that break it; and, at load, a probe: one small
group of random tokens as a shared row and as plain rows. The probe also holds the log-probs of strop's head beside
those of the model's own logits, and looks whether the model sees later tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from strop.types import Completion, Group, Origin

ARCHITECTURES = frozenset(
    {
        "afmoe",
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hyperclovax",
        "internlm3",
        "jais2",
        "llama",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "starcoder2",
        "vaultgemma",
        "youtu",
    }
)
"""transformers' model_type of the architectures that shared-prefix rows are tested with."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_CAUSAL_FOR_TEXT = (None, False, "vision")
"""Values of use_bidirectional_attention that leave text causal; "vision" means the tokens of one image alone."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_STATIC_WITH_ALPHA = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})
"""Architectures whose rotary scaling is called dynamic and fixed all the same, by an alpha."""


def reason_against(config: PreTrainedConfig, attn_implementation: str | None = None) -> str | None:
    """Why this model gets plain rows; None where shared rows are right. attn_implementation: what is asked for in place
    of strop's own attention, if anything is."""
    if attn_implementation is not None:
        return f"attn_implementation is {attn_implementation}"
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        return f"it has layers of the kind {', '.join(sorted(others))}"
    if getattr(text, "use_bidirectional_attention", None) not in _CAUSAL_FOR_TEXT:
        return "its attention is bidirectional"
    if config.model_type not in ARCHITECTURES:
        return _reason_against_architecture(config)
    if (kind := rope_by_length(config)) is not None:
        return f"its rotary embedding ({kind}) depends on the longest row of a batch"
    return None


def _reason_against_architecture(config: PreTrainedConfig) -> str:
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if known and not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_attention_backend:
        return f"how the architecture {config.model_type} mixes its tokens cannot be exchanged"
    return f"the architecture {config.model_type} is not among those it is tested with"


def rope_by_length(config: PreTrainedConfig) -> str | None:
    """The kind of rotary scaling, where frequencies depend on the longest row; else None."""
    fixed = config.model_type in _STATIC_WITH_ALPHA
    kinds = {p.get("rope_type") for p in _rope_parameters(config) if not (fixed and p.get("alpha"))}
    return next((kind for kind in _LENGTH_DEPENDENT if kind in kinds), None)


def rope_threshold(config: PreTrainedConfig) -> int | None:
    """Up to this many tokens a row's length does not matter to the rotary embedding."""
    if rope_by_length(config) is None:
        return None
    limits = [
        p["original_max_position_embeddings"]
        for p in _rope_parameters(config)
        if "original_max_position_embeddings" in p
    ]
    text = config.get_text_config()
    own = getattr(text, "original_max_position_embeddings", None)
    return int(min(limits or [own or text.max_position_embeddings]))


def _rope_parameters(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of the text model, which stand in one mapping or in one per layer type."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield parameters
    yield from (inner for inner in parameters.values() if isinstance(inner, Mapping))


PROBE_LENGTHS = (7, 5, 4)
"""Tokens of the probe's prompt, first (and third) and second completion."""
PROBE_UNCHANGED = 3
"""Scored tokens of the third completion that come before the token in which it differs from the first."""


def probe_group(num_ids: int) -> Group:
    """A group of random ids below `num_ids`, always the same; the third completion is the first with another id in
    its last token but one (the last is only a target)."""
    draw = torch.Generator().manual_seed(0)
    prompt, first, second = (array("q", torch.randint(num_ids, (n,), generator=draw).tolist()) for n in PROBE_LENGTHS)
    third = array("q", [*first[:-2], (first[-2] + 1) % num_ids, first[-1]])
    completions = tuple(Completion(c, bytes([1]) * len(c)) for c in (first, second, third))
    return Group(prompt, completions, Origin("probe", 1))


def tolerance(compute: torch.dtype, noise: float) -> float:
    """How far the means of two ways to score may lie apart. noise: what rounding moves in this model, measured; between
    shared and plain rows of right models it is met to 60 % (32 of them, to 12 layers, in bfloat16). A floor stands for
    norms and softmaxes that compute in float32 whatever the model computes in."""
    floor = {torch.float64: 1e-8, torch.float32: 2e-5}.get(compute, torch.finfo(compute).eps / 4)
    return floor + 4 * noise


def mean_apart(a: Tensor, b: Tensor) -> float:
    """The mean absolute difference."""
    return float((a.double() - b.double()).abs().mean())
