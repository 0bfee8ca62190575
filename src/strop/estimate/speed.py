"""How fast this processor trains an architecture: measured on a model of it with few layers. Floor 5.

In: a configuration, and the lengths of a micro-batch. Out: seconds per layer and for the rest. Two models with random
weights, of one layer and of three, take the micro-batch forward and backward and an update; what the two more layers
cost is the layers', what is left is the rest's: embedding, head, optimizer. Nothing is loaded.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from strop.allocator import keep_few_kernels, keep_freed_memory
from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.engine.optim import build_optimizer
from strop.lengths import Sized
from strop.policy.build import elementwise_of
from strop.policy.kernels.denormals import flush_denormals
from strop.policy.kernels.fused import fuse
from strop.policy.model.adapter_settings import adapters_of
from strop.policy.model.adapters import add_adapters
from strop.policy.model.from_config import CannotBuildError, random_model
from strop.policy.model.quantisation_settings import quantisation_of
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.policy.prefix_sharing import reason_against
from strop.terminal import warnings_only
from strop.types import Completion, Group, GroupLengths, Origin

FEW, MORE = 1, 3
"""Layers of the two models."""
VOCABULARY = 16_384
"""Entries of their vocabulary, at most; the head's seconds grow with it."""
SECONDS, MOST = 10.0, 7
"""Of all calls together, and how often each is made, at most. They are made in turn and the least of each counts: what
others make a processor wait comes and goes within seconds, and what it adds to one model alone is taken for the cost of
layers, of which there are many."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a micro-batch, forward and backward, in one layer and in embedding and head; and those of an update of
    the weights that train. vocabulary: entries that the head had."""

    layer: float
    rest: float
    layer_update: float
    rest_update: float
    vocabulary: int


def measure(config: RunConfig, model: ModelSection, precision: Precision, groups: Sequence[Sized]) -> Speed:
    """The speed of training on `groups`. Draws no random number that a run would see.

    Raises:
        CannotBuildError: the architecture cannot be built with so few layers, or the base is quantised.
    """
    if quantisation_of(model) is not None:
        raise CannotBuildError("the time of a quantised base is not predicted", where=model.name)
    keep_few_kernels()
    flush_denormals()
    if adapters_of(config.lora, model) is None:
        keep_freed_memory()
    with torch.random.fork_rng(devices=[]), warnings_only():
        few_step, few_update, vocabulary = _built(config, model, precision, groups, FEW)
        more_step, more_update, _ = _built(config, model, precision, groups, MORE)
        few, few_up, more, more_up = _least((few_step, few_update, more_step, more_update))
    layer, rest = _parts(few, more)
    layer_update, rest_update = _parts(few_up, more_up)
    return Speed(layer, rest, layer_update, rest_update, vocabulary)


def _parts(few: float, more: float) -> tuple[float, float]:
    """Seconds of a layer and of the rest, by those of the two models."""
    layer = max(0.0, (more - few) / (MORE - FEW))
    return layer, max(0.0, few - FEW * layer)


def _built(
    config: RunConfig, model: ModelSection, precision: Precision, groups: Sequence[Sized], layers: int
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """What computes the micro-batch, what updates the weights; entries of the vocabulary."""
    adapters = adapters_of(config.lora, model)
    dtype = precision.master if adapters is None else precision.compute
    reward_model = config.post_training.REWARD_MODEL
    loaded = random_model(model, layers=layers, vocabulary=VOCABULARY, dtype=dtype, reward_model=reward_model)
    vocabulary = loaded.module.get_input_embeddings().weight.shape[0]
    module: nn.Module = loaded.module
    if adapters is not None:
        module = add_adapters(loaded.module, adapters, model, seed=config.seed, master=precision.master)
    shares = reason_against(loaded.config, model.attn_implementation) is None
    policy = Policy(module, loaded, precision, share_prefix=shares, fp32_logits=config.training.fp32_logits)
    fuse(module, policy.weight_copies, policy.device, elementwise_of(config.training, policy.device))
    batch = policy.collate([_random_group(group.lengths, vocabulary) for group in groups])
    parameters = policy.trainable()
    optimizer = build_optimizer(parameters, config.training)

    def compute() -> None:
        with policy.weights_fixed():
            policy(batch).logps.sum().backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

    return compute, update, 1 if reward_model else vocabulary


def _random_group(lengths: GroupLengths, vocabulary: int) -> Group:
    random = torch.Generator().manual_seed(sum(lengths.completions))

    def ids(count: int) -> array[int]:
        return array("i", torch.randint(vocabulary, (count,), generator=random).tolist())

    completions = tuple(Completion(ids(n), bytes([1]) * n) for n in lengths.completions)
    return Group(ids(lengths.prompt), completions, Origin("random", 1))


def _least(works: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds of the fastest call of each, made in turn, the first of each left out."""
    for work in works:
        work()
    rounds: list[list[float]] = []
    while not rounds or (sum(map(sum, rounds)) < SECONDS and len(rounds) < MOST):
        rounds.append([_seconds(work) for work in works])
    return [min(calls) for calls in zip(*rounds, strict=True)]


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
