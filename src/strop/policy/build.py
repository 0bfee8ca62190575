"""A model section to a policy, as it is before the first step. Floor 2.

The order is the same for every kind of model, and nothing is looked for afterwards:

    load the weights
    add or continue adapters; from here on it is known what trains, and by which names
    hash what was loaded, where it is asked for
    recompute layers where that is settled; to the device
    fuse layers
    probe: the fused layers, and rows that share prompts, against the model's own forward
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from strop.config.run import RunConfig
from strop.config.sections import ModelSection, TrainingSection
from strop.errors import ConfigError
from strop.policy import prefix_sharing
from strop.policy.allocator import keep_few_kernels, keep_freed_memory
from strop.policy.checkpointing import checkpoint_layers
from strop.policy.kernels.denormals import flush_denormals
from strop.policy.kernels.elementwise import EAGER, Elementwise, compiled
from strop.policy.kernels.fused import fuse
from strop.policy.kernels.matmul import widens
from strop.policy.kernels.product_rates import bf16_gain
from strop.policy.model import identity
from strop.policy.model.adapters import add_adapters, continue_adapters
from strop.policy.model.folder import place_of
from strop.policy.model.load import LoadedModel, load_model, model_errors
from strop.policy.model.tokenizer import check_vocabulary, load_tokenizer
from strop.policy.policy import Policy
from strop.policy.precision import Precision, resolve_precision, short_name
from strop.policy.probe import own_logps, probe

logger = logging.getLogger("strop")


def build_policy(
    config: RunConfig,
    model: ModelSection,
    device: torch.device,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    hashed: bool = False,
) -> Policy:
    """The policy of one model of the configuration, as it is before the first step.

    Args:
        tokenizer: the model's, where it is loaded already.
        hashed: take its `weights_hash`.

    Raises:
        ModelError, ConfigError: it cannot be built as the configuration says.
    """
    keep_few_kernels()
    if device.type == "cpu":
        flush_denormals()
    where, training = place_of(model), config.training
    precision = resolve_precision(training, device)
    if device.type == "cpu" and precision.compute == torch.bfloat16 and (gain := bf16_gain()) < 1:
        logger.warning(
            "bfloat16 takes longer than float32 on this processor, whose products are %.2g times as fast in it, and "
            "saves some memory; training.auto_precision: true chooses the faster one",
            gain,
        )
    elif device.type == "cpu" and widens(precision.compute):
        logger.warning(
            "products of %s are made in float32 and rounded on this processor, which takes longer than float32 itself "
            "and saves some memory; good to try a GPU's configuration",
            short_name(precision.compute),
        )
    adapted = config.adapts(model)
    if device.type == "cpu" and not adapted:
        keep_freed_memory()
    loaded = load_model(model, dtype=precision.compute if adapted else precision.master)
    check_vocabulary(load_tokenizer(model) if tokenizer is None else tokenizer, loaded.module, where)
    _check_length(loaded, training.max_seq_length, where)
    module: nn.Module = loaded.module
    if model.adapter is not None:
        module = continue_adapters(loaded.module, config.lora, model, master=precision.master)
    elif adapted:
        module = add_adapters(loaded.module, config.lora, model, seed=config.seed, master=precision.master)
    digest = identity.weights_hash(module) if hashed else None
    random = adapted and config.lora.lora_dropout > 0
    checkpoint_layers(module, training.recomputed, random=random, where=where)
    elementwise = elementwise_of(training, device)
    policy = assemble(
        module.to(device),
        loaded,
        precision,
        model,
        fp32_logits=training.fp32_logits,
        elementwise=elementwise,
        weights_hash=digest,
    )
    policy.save_dtype = None if training.save_dtype == "auto" else getattr(torch, training.save_dtype)
    return policy


def elementwise_of(training: TrainingSection, device: torch.device) -> Elementwise:
    """As `training.torch_compile` says.

    Raises:
        ConfigError: nothing can be compiled here.
    """
    return compiled(device) if training.torch_compile else EAGER


def assemble(
    module: nn.Module,
    loaded: LoadedModel,
    precision: Precision,
    model: ModelSection,
    *,
    fp32_logits: bool,
    elementwise: Elementwise = EAGER,
    weights_hash: str | None = None,
) -> Policy:
    """A policy around a model that is on its device, with the rows that are right for it, probed.

    Raises:
        ModelError: the model's own logits differ from the policy's, or it sees later tokens.
    """
    where = place_of(model)
    reason = prefix_sharing.reason_against(loaded.config, model.attn_implementation)
    if getattr(loaded.config.get_text_config(), "output_router_logits", False):
        logger.warning("%s: its auxiliary loss for the router is not part of any objective here; it is off", where)
    policy = Policy(
        module,
        loaded,
        precision,
        share_prefix=reason is None,
        fp32_logits=fp32_logits,
        where=where,
        weights_hash=weights_hash,
    )
    with model_errors(where, "its forward pass"):
        own = own_logps(policy)  # before layers get other forwards than the model's
    if own.transform != policy.transform:
        logger.info("%s: its logits, measured: %s", where, own.transform.describe())
        policy.transform = own.transform
    fuse(module, policy.casts, policy.device, elementwise)
    refused = probe(policy, own)
    if refused is not None:
        logger.warning(
            "%s: prompts are not shared, so each is computed again for every further completion: %s; %s",
            where,
            refused,
            "training in float32 (bf16: false, fp16: false) may tell them apart from rounding"
            if precision.is_low
            else "the result is the same, only slower",
        )
    reason = refused or reason
    if reason is not None:
        policy.share_prefix, policy.plain_reason = False, reason
        logger.info("%s: plain padded rows, prompts are not shared: %s", where, reason)
    return policy


def _check_length(loaded: LoadedModel, max_seq_length: int, where: str) -> None:
    """Rows that are longer than the model's positions: impossible where positions are learned, said where rotary."""
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    kind = prefix_sharing.rope_by_length(loaded.config)
    threshold = prefix_sharing.rope_threshold(loaded.config)
    if kind == "dynamic" and threshold is not None and max_seq_length > threshold:
        raise ConfigError(
            f"training.max_seq_length is {max_seq_length}; with dynamic rotary scaling, rows of more than {threshold} "
            "tokens have log-probs that depend on the rows before them",
            where=where,
            fix=f"set training.max_seq_length to {threshold} or less",
        )
    if not isinstance(limit, int) or max_seq_length <= limit:
        return
    learned = [m for n, m in loaded.module.named_modules() if isinstance(m, nn.Embedding) and _is_position(n)]
    if learned:
        raise ConfigError(
            f"training.max_seq_length is {max_seq_length}, but the model has {limit} positions",
            where=where,
            fix=f"set training.max_seq_length to {limit} or less",
        )
    logger.warning("%s: max_seq_length %d is beyond the %d positions it was made for", where, max_seq_length, limit)


def _is_position(name: str) -> bool:
    return name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")
