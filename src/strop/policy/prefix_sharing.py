"""Which models may use shared-prefix rows, and the group of tokens by which that is checked at load. Floor 2.

A model has to pass three checks. Its architecture is on an allowlist: tokens influence each other only through
attention, which goes through transformers' interface and passes keywords on; each entry is tested. Its settings do not
break that. And a probe at load gives equal log-probs for one small group of random tokens as a shared row and as plain
rows. The probe also compares the log-probs of strop's head with those of the model's own logits, and checks that the
model does not see later tokens.
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
"""The model_type (of transformers) of each architecture for which shared-prefix rows are tested."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_CAUSAL_FOR_TEXT = (None, False, "vision")
"""Values of use_bidirectional_attention under which text stays causal; "vision" affects tokens of images only."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_STATIC_WITH_ALPHA = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})
"""Architectures whose rotary scaling is called dynamic although an alpha makes it fixed."""


def reason_against(config: PreTrainedConfig, attn_implementation: str | None = None) -> str | None:
    """Why this model gets plain rows; None if shared rows are right.

    attn_implementation: the attention that the configuration asks for in place of strop's own.
    """
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
        return f"the attention of the architecture {config.model_type} cannot be replaced"
    return f"sharing is not tested with the architecture {config.model_type}"


def rope_by_length(config: PreTrainedConfig) -> str | None:
    """The kind of rotary scaling, if its frequencies depend on the longest row of a batch; else None."""
    fixed = config.model_type in _STATIC_WITH_ALPHA
    kinds = {p.get("rope_type") for p in _rope_parameters(config) if not (fixed and p.get("alpha"))}
    return next((kind for kind in _LENGTH_DEPENDENT if kind in kinds), None)


def rope_threshold(config: PreTrainedConfig) -> int | None:
    """The length up to which rotary embeddings do not depend on the longest row; None: they never do."""
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
    """The rotary settings of the text model: one mapping, or one per type of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield parameters
    yield from (inner for inner in parameters.values() if isinstance(inner, Mapping))


PROBE_LENGTHS = (7, 5, 4)
"""Tokens of the probe's prompt, of its first and third completion, and of its second completion."""
PROBE_UNCHANGED = 3
"""How many scored tokens of the third completion come before the token in which it differs from the first."""


def probe_group(num_ids: int) -> Group:
    """A group of random ids below `num_ids`, always the same. The third completion is the first one with another id as
    its second to last token (the last one is not fed to the model)."""
    draw = torch.Generator().manual_seed(0)
    prompt, first, second = (array("q", torch.randint(num_ids, (n,), generator=draw).tolist()) for n in PROBE_LENGTHS)
    third = array("q", [*first[:-2], (first[-2] + 1) % num_ids, first[-1]])
    completions = tuple(Completion(c, bytes([1]) * len(c)) for c in (first, second, third))
    return Group(prompt, completions, Origin("probe", 1))


def tolerance(compute: torch.dtype, noise: float) -> float:
    """How much the mean log-probs of two ways of scoring may differ.

    noise: how much rounding moves them in this model, as measured. Shared and plain rows of correct models differ by up
    to 60 % of the tolerance (32 models of up to 12 layers, in bfloat16). It has a lower bound, as norms and softmaxes
    compute in float32 in all models.
    """
    floor = {torch.float64: 1e-8, torch.float32: 2e-5}.get(compute, torch.finfo(compute).eps / 4)
    return floor + 4 * noise


def mean_apart(a: Tensor, b: Tensor) -> float:
    """The mean absolute difference."""
    return float((a.double() - b.double()).abs().mean())
