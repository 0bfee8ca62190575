"""Builds the policy of a model section, as it is before the first step. Floor 2.

The order is the same for every kind of model:

    load the weights, or only where they are, if they will be sharded (model/deferred_weights.py)
    add or continue adapters; from here on it is known which weights train, and under which names
    hash what was loaded, if asked for
    switch recomputation of layers on
    move the model to the device, or its parts to the devices of several processes (strategy.py)
    fuse layers
    probe: compare fused layers and shared-prefix rows with the model's own forward pass
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from strop.allocator import keep_few_kernels, keep_freed_memory
from strop.config.run import RunConfig
from strop.config.sections import ModelSection, TrainingSection
from strop.errors import ConfigError, ModelError
from strop.policy import prefix_sharing
from strop.policy.gradient_checkpointing import checkpoint_layers
from strop.policy.kernels.denormals import flush_denormals
from strop.policy.kernels.elementwise import EAGER, Elementwise, compiled
from strop.policy.kernels.fused import fuse
from strop.policy.kernels.matmul import widens
from strop.policy.kernels.product_rates import bf16_gain
from strop.policy.model import model_hashes
from strop.policy.model.adapter_init import initial_adapter
from strop.policy.model.adapters import add_adapters, continue_adapters
from strop.policy.model.deferred_weights import DeferredWeights
from strop.policy.model.folder import place_of
from strop.policy.model.load import LoadedModel, load_model, model_errors
from strop.policy.model.quantisation_settings import check_adapts
from strop.policy.model.task import SCORE, draw_score, head_of, padding_id, with_one_label
from strop.policy.model.tokenizer import check_model, check_vocabulary, read_tokenizer
from strop.policy.policy import Policy
from strop.policy.precision import Precision, resolve_precision
from strop.policy.probe import Own, own_logps, probe
from strop.policy.sharding import Sharded
from strop.policy.strategy import Replicated, Strategy
from strop.readable import short_name
from strop.world import World

logger = logging.getLogger("strop")


def build_policy(
    config: RunConfig,
    model: ModelSection,
    device: torch.device,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    hashed: bool = False,
    world: World | None = None,
) -> Policy:
    """The policy of one model of the configuration, as it is before the first step.

    Args:
        tokenizer: that of the model, if it is loaded already.
        world: the processes that train it together, of which this one computes on `device`. None: it is alone.
        hashed: compute `Policy.weights_hash`.

    Raises:
        ModelError, ConfigError: the model cannot be built as configured.
    """
    keep_few_kernels()
    if device.type == "cpu":
        flush_denormals()
    where, training = place_of(model), config.training
    precision, adapted = resolve_precision(training, device), config.adapts(model)
    if device.type == "cpu":
        _warn_of_slow_precision(precision)
        if not adapted:
            keep_freed_memory()
    check_adapts(model, adapted)
    world = world or World.alone(device)
    loaded = _loaded(config, model, precision, tokenizer, world)
    module = _adapted(config, model, loaded, master=precision.master)
    initial = initial_adapter(module, config.lora) if model.adapter is None and isinstance(module, PeftModel) else None
    digest = hash_of(module, loaded, world) if hashed else None
    random = adapted and config.lora.lora_dropout > 0
    checkpoint_layers(module, training.recomputed, random=random, where=where)
    elementwise = elementwise_of(training, device)
    policy = assemble(
        module,
        loaded,
        precision,
        model,
        fp32_logits=training.fp32_logits,
        elementwise=elementwise,
        weights_hash=digest,
        temperature=sampling_temperature(config),
        place=strategy_of(config, world, loaded.deferred),
    )
    policy.initial_adapter = initial
    policy.has_new_head = loaded.new_head and model.adapter is None
    policy.save_dtype = None if training.save_dtype == "auto" else getattr(torch, training.save_dtype)
    return policy


def _adapted(config: RunConfig, model: ModelSection, loaded: LoadedModel, *, master: torch.dtype) -> nn.Module:
    """The loaded model with the adapters that the run trains, if it trains any."""
    module: nn.Module = loaded.module
    if model.adapter is not None:
        module = continue_adapters(loaded.module, config.lora, model, master=master)
    elif config.adapts(model):
        new = loaded.new_tokens
        module = add_adapters(loaded.module, config.lora, model, seed=config.seed, master=master, new_tokens=new)
    if loaded.deferred is not None:
        loaded.deferred.follow(module, copies=model.adapter is None)
    return module


def may_defer(config: RunConfig, model: ModelSection, world: World) -> bool:
    """Whether weights can stay in their files until they are sharded: nothing computes with them before."""
    new_adapters = config.adapts(model) and model.adapter is None
    reads_base = new_adapters and (config.lora.moves_base or config.lora.use_dora)
    return is_sharded(config, world) and not reads_base


def is_sharded(config: RunConfig, world: World) -> bool:
    """Whether the weights lie in parts over these processes."""
    return config.gpu.fsdp and world.size > 1


def hash_of(module: nn.Module, loaded: LoadedModel, world: World) -> str:
    """`model_hashes.weights_hash` of a loaded model, also where its weights are still in the files. Collective then.

    module: `loaded.module`, or the peft model around it.
    """
    if loaded.deferred is None:
        return model_hashes.weights_hash(module)
    return model_hashes.weights_hash(module, loaded.deferred.digests(module, world))


def _loaded(
    config: RunConfig,
    model: ModelSection,
    precision: Precision,
    tokenizer: PreTrainedTokenizerBase | None,
    world: World,
) -> LoadedModel:
    """The model as the configuration wants it, once it has been found to fit its tokenizer and the rows."""
    reward_model = config.post_training.REWARD_MODEL
    dtype = precision.compute if config.adapts(model) else precision.master
    how = {"sharded": is_sharded(config, world), "defer": may_defer(config, model, world)}
    loaded = load_model(model, dtype=dtype, reward_model=reward_model, **how)
    if tokenizer is None:
        tokenizer = read_tokenizer(model)
        check_model(model, tokenizer, reward_model=reward_model)
    check_vocabulary(tokenizer, loaded.module, place_of(model))
    if reward_model:
        _settle_reward_model(loaded, tokenizer, model, config.seed)
    _check_length(loaded, config.training.max_seq_length, place_of(model), sharded=config.gpu.fsdp)
    return loaded


def sampling_temperature(config: RunConfig) -> float:
    """What the logits of the policy and of its reference are divided by: log-probs are those of what is sampled, or of
    what was sampled for rows whose log-probs ratios compare with."""
    is_sampled = config.rollout.enabled or "old_logps" in config.post_training.NUMBERS
    return config.rollout.temperature if is_sampled else 1.0


def _settle_reward_model(
    loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase, model: ModelSection, seed: int
) -> None:
    """Names the padding token, by which the model's own forward finds the end of a row, and draws a head that is new.

    Raises:
        ModelError: it has no head that strop knows.
    """
    where = place_of(model)
    if head_of(loaded.module) is None:
        raise ModelError(
            f"{type(loaded.module).__name__} has no linear layer called {SCORE}",
            where=where,
            expected="a decoder whose sequence classification has one",
            fix="choose a model of another architecture",
        )
    for config in (loaded.module.config, loaded.config):
        with_one_label(config).get_text_config().pad_token_id = padding_id(tokenizer)
    if loaded.new_head:
        draw_score(loaded.module, seed)
        if model.adapter is None:
            logger.info("%s: its head is new, drawn from seed %d", where, seed)


Place = Callable[[Policy], Strategy]
"""Moves a policy to the devices of the processes that train it, in place."""


def strategy_of(config: RunConfig, world: World, deferred: DeferredWeights | None = None) -> Place:
    """How `config.gpu` wants the weights to lie over these processes. deferred: those that are still in the files."""
    if is_sharded(config, world):
        return partial(Sharded, world=world, shard_size=config.gpu.shard_size, deferred=deferred)
    if config.gpu.fsdp:
        logger.warning("gpu.fsdp is true, and there is one process: nothing is sharded")
    return partial(_replicated, world=world)


def _replicated(policy: Policy, world: World) -> Strategy:
    policy.to(world.device)
    return Replicated(policy, world)


def _warn_of_slow_precision(precision: Precision) -> None:
    """Warns if this CPU is slower in 16 bits than in float32."""
    if precision.compute == torch.bfloat16 and (gain := bf16_gain()) < 1:
        logger.warning(
            "bfloat16 is slower than float32 on this processor (products run at %.2g times the speed) and saves some "
            "memory; training.auto_precision: true chooses the faster one",
            gain,
        )
    elif widens(precision.compute):
        logger.warning(
            "on this processor, products of %s are computed in float32 and rounded, which is slower than float32 "
            "itself and saves some memory; use it to try out the configuration of a GPU",
            short_name(precision.compute),
        )


def elementwise_of(training: TrainingSection, device: torch.device) -> Elementwise:
    """Elementwise functions, compiled if `training.torch_compile` is set.

    Raises:
        ConfigError: this machine cannot compile.
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
    temperature: float = 1.0,
    place: Place | None = None,
) -> Policy:
    """Wraps a model, chooses its row layout, moves it to its device, fuses its layers and probes the result. All
    processes have the same layout: where the probe of one refuses shared rows, none shares.

    Args:
        temperature: what its logits are divided by.
        place: None: the model is on its device.

    Raises:
        ModelError: the policy's log-probs differ from the model's own, or the model sees later tokens.
    """
    where = place_of(model)
    reason = prefix_sharing.reason_against(loaded.config, model.attn_implementation)
    if getattr(loaded.config.get_text_config(), "output_router_logits", False):
        logger.warning("%s: the auxiliary loss for the router is off: no objective here contains it", where)
    policy = Policy(
        module,
        loaded,
        precision,
        share_prefix=reason is None,
        fp32_logits=fp32_logits,
        where=where,
        weights_hash=weights_hash,
    )
    if place is not None:
        policy.strategy = place(policy)
    with model_errors(where, "its forward pass"):
        own = own_logps(policy)  # before layers get other forwards than the model's
    if own.transform != policy.transform:
        logger.info("%s: its logits, measured: %s", where, own.transform.describe())
        policy.transform = own.transform
    fuse(module, policy.weight_copies, policy.device, elementwise, policy.strategy.gathered)
    reason = _refused_by_probe(policy, own, precision) or reason
    if reason is not None:
        policy.share_prefix, policy.plain_reason = False, reason
        logger.info("%s: plain padded rows, prompts are not shared: %s", where, reason)
    if temperature != 1.0:
        policy.transform = policy.transform.at_temperature(temperature)
    return policy


def _refused_by_probe(policy: Policy, own: Own, precision: Precision) -> str | None:
    """Why the probe of any process refuses shared rows, with a warning; None: none does."""
    found = policy.strategy.world.gather(probe(policy, own))  # what rounding does may differ by machine
    refused = next((why for why in found if why is not None), None)
    if refused is not None:
        logger.warning(
            "%s: prompts are not shared, so each is computed again for every completion: %s; %s",
            policy.where,
            refused,
            "in float32 (bf16: false, fp16: false), where rounding is smaller, they may pass this check"
            if precision.is_low
            else "the result is the same, only slower",
        )
    return refused


def _check_length(loaded: LoadedModel, max_seq_length: int, where: str, *, sharded: bool) -> None:
    """Refuses rows that are longer than a model with learned positions can take; for others, warns."""
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
    if sharded and threshold is not None and max_seq_length > threshold:
        raise ConfigError(
            f"training.max_seq_length is {max_seq_length}; with this model's rotary scaling, rows of more than "
            f"{threshold} tokens are computed one by one, and a sharded model needs equal passes",
            where=where,
            fix=f"set training.max_seq_length to {threshold} or less, or leave gpu.fsdp out",
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
    logger.warning(
        "%s: max_seq_length %d exceeds the %d positions the model was made for", where, max_seq_length, limit
    )


def _is_position(name: str) -> bool:
    return name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")
