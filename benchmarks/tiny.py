"""Tiny models of every causal architecture of the installed transformers, from their own configuration classes.

A configuration class says by its attributes what it can be told; sizes are set where it has an attribute of that name,
also in the configurations inside it (text, vision, audio). What an architecture needs beside that stands in `OWN`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512
LARGEST = 8_000_000
"""Weights of a model that is still tiny."""
_NAMES: dict[int, str] = {
    32: "hidden_size n_embd d_model dim n_embed emb_dim model_dim word_embed_proj_dim embedding_size lru_width "
    "attention_hidden_size conv_dim hidden_size_global",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads mamba_n_groups num_global_layers depth",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads rotary_dim linear_conv_kernel_dim moe_num_experts "
    "num_experts num_local_experts n_routed_experts linear_num_value_heads mamba_num_heads mamba_n_heads "
    "time_step_rank mamba_dt_rank sliding_window",
    8: "head_dim hidden_size_per_layer_input kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim state_size "
    "ssm_state_size mamba_d_state linear_key_head_dim linear_value_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank qk_head_dim "
    "mamba_head_dim mamba_d_head chunk_size mamba_chunk_size",
    48: "intermediate_size ffn_dim n_inner ffn_hidden_size dim_ff d_ff encoder_ffn_dim decoder_ffn_dim",
    128: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
SIZES: dict[str, float] = {name: size for size, names in _NAMES.items() for name in names.split()} | {
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "expand": 2,
    "n_mamba_heads": 2,
    "initializer_range": 0.1,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": ...}
_QWEN4 = {**_HYBRID, **_INDEXER, "hc_lowrank": 8}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_HYBRID, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "ministral": {"head_dim": 8},
    "olmo_hybrid": _HYBRID,
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": VOCABULARY, "shape_embed_dim": 32, "pronunciation_embed_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "n_mamba_heads": 2},
    "zamba2": {**_ZAMBA, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}

NOT_ALONE = {
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads",
    "musicgen": "it writes codes of sound, by a class that takes no configuration of this kind",
    "musicgen_melody": "it writes codes of sound, by a class that takes no configuration of this kind",
}
"""Why a kind that transformers lists as a causal language model is none that text alone could train."""


def tiny_config(kind: str, **changes: Any) -> Any:
    """A configuration of this model_type for a model that trains in a moment. changes: settings that differ."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    keys = _keys(cls) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    return cls(**_merged(_merged(keys, OWN.get(kind, {})), changes))


def write_model(kind: str, folder: Path) -> int:
    """A model of random weights and a tokenizer in `folder`; how many weights.

    Raises:
        ValueError: it would not be tiny, or is no model by itself.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if kind in NOT_ALONE:
        raise ValueError(NOT_ALONE[kind])
    config = tiny_config(kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"it has {count:,} weights where its sizes are the smallest known")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    model(input_ids=torch.tensor([[2, 5, 6, 7, 8, 9]]), use_cache=False)  # the sizes fit each other
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return count


def _tokenizer() -> Any:
    """Of bytes, since some architectures have tokenizer classes that take nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from strop.demo.model import ASSISTANT, CHAT_TEMPLATE, END, PAD, UNK, USER

    special = [PAD, UNK, USER, ASSISTANT, END]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _keys(cls: Any, depth: int = 0) -> dict[str, Any]:
    default = cls()
    keys: dict[str, Any] = {}
    for name, value in SIZES.items():
        old = _read(default, name)
        own = isinstance(getattr(cls, name, None), property) or cls.attribute_map.get(name, name) != name
        if not own and (
            isinstance(old, int | float | list) or (name == "num_key_value_heads" and name in vars(default))
        ):
            keys[name] = value
    if "kv_lora_rank" in keys:  # latent attention has no groups of heads
        keys["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, value in vars(default).items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            keys[name] = 5
    for name, part in cls.sub_configs.items():
        inner = getattr(default, name, None)
        kind = type(inner) if inner is not None else part
        if depth < 2 and hasattr(kind, "sub_configs") and (inner is not None or name == "text_config"):
            keys[name] = _keys(kind, depth + 1) | ({"model_type": kind.model_type} if kind.model_type else {})
    return keys


def _read(config: Any, name: str) -> Any:
    """An attribute; 0 where the configuration has it but does not tell, since it is another in each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 (transformers' own kinds of errors)
        return 0


def _merged(keys: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """own over keys, inner mappings too; `...` takes a key away."""
    merged = dict(keys)
    for name, value in own.items():
        if value is ...:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = value
    return merged
