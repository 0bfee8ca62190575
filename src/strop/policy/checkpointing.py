"""Gradient checkpointing: which layers compute their activations again in the backward pass. Floor 2."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from strop.errors import ModelError


def layers_that_can(module: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a model that can be checkpointed, in order."""
    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def checkpoint_layers(module: nn.Module, share: float, *, random: bool, where: str) -> int:
    """Switch checkpointing on for a share of the layers, evenly spread, and off for the rest; how many.

    The layers must stay in train mode: transformers checkpoints nothing in eval mode. `random`: a layer draws random
    numbers (lora_dropout), so that its random state has to be kept for the second time.

    Raises:
        ModelError: the model has no layers that can be checkpointed.
    """
    layers = layers_that_can(module)
    if share and not layers:
        raise ModelError(
            "training.gradient_checkpointing: this model has no layers that transformers can checkpoint",
            where=where,
            fix="set it to false",
        )
    wanted = max(1, round(share * len(layers))) if share else 0
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
    for i, layer in enumerate(layers):
        # every layer at which the rounded-down count of layers so far steps up: exactly `wanted`, evenly spread
        layer.gradient_checkpointing = (i + 1) * wanted // len(layers) > i * wanted // len(layers)
        layer._gradient_checkpointing_func = recompute
    assert sum(layer.gradient_checkpointing for layer in layers) == wanted
    return wanted


def checkpoint_all(module: nn.Module) -> bool:
    """Switch checkpointing on for every layer of a model that `checkpoint_layers` has seen; whether that changes
    anything."""
    without = [layer for layer in layers_that_can(module) if not layer.gradient_checkpointing]
    for layer in without:
        layer.gradient_checkpointing = True
    return bool(without)
