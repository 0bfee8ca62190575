"""Gradient checkpointing: which layers recompute their activations in the backward pass. Floor 2."""

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
    """Switches checkpointing on for a share of the layers, evenly spread, and off for the others.

    The layers must stay in train mode, since transformers checkpoints nothing in eval mode.

    Args:
        random: whether layers draw random numbers (lora_dropout); then their random state is kept for recomputation.

    Returns:
        How many layers are checkpointed.

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
    """Switches checkpointing on for all layers, after `checkpoint_layers`. Returns whether that changed anything."""
    without = [layer for layer in layers_that_can(module) if not layer.gradient_checkpointing]
    for layer in without:
        layer.gradient_checkpointing = True
    return bool(without)
