"""Which linear layers do nothing but a product with their weight, and one with plain LoRA. Floor 2."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from strop.policy.kernels.quantised_weights import DequantisingForward, is_in_bytes, is_quantised

_OF_QUANTISED = ("peft.tuners.lora.bnb", "peft.tuners.lora.torchao")


def is_plain_linear(module: nn.Linear | LoraLayer) -> bool:
    """Whether its forward is a product, with or without one plain adapter. A quantised layer in bytes needs the
    adapter: without one, it has a forward of its own already."""
    if isinstance(module, nn.Linear):
        return is_untouched(module) and (
            type(module) is nn.Linear or (is_quantised(module) and not is_in_bytes(module))
        )
    base: Any = module.base_layer
    return (
        is_untouched(module)
        and (_is_lora_of_plain(module, base) or _is_lora_of_quantised(module, base))
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not module.fan_in_fan_out
        and all(layer.bias is None for layer in module.lora_B.values())
        and all(isinstance(d, nn.Identity | nn.Dropout) for d in module.lora_dropout.values())
    )


def _is_lora_of_plain(module: LoraLayer, base: Any) -> bool:
    return type(module) is LoraLinear and type(base) is nn.Linear and is_untouched(base)


def _is_lora_of_quantised(module: LoraLayer, base: Any) -> bool:
    """By peft's adapters for them. The forward that layers in bytes are given is no other product."""
    if type(module).__module__ not in _OF_QUANTISED or not is_quantised(base):
        return False
    return _is_unhooked(base) and (
        "forward" not in vars(base) or isinstance(vars(base)["forward"], DequantisingForward)
    )


def is_untouched(module: nn.Module) -> bool:
    """Nothing was put around its forward."""
    return "forward" not in vars(module) and _is_unhooked(module)


def _is_unhooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)
