"""What a model's own code draws at random while it trains, switched off: only `lora.lora_dropout` acts. Floor 2.

So that training sees the model that inference will run, and a prompt has the same log-probs every time.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_USED_IN_INFERENCE = frozenset({("phimoe", "router_jitter_noise")})
"""Settings called a jitter by which the model computes when nothing is drawn, too, by model_type."""
_DRAWING_ROUTERS = frozenset({"PhimoeTopKRouter"})
"""Classes of routers that draw experts at random in training mode, whatever the configuration says."""


def silence_config(config: PreTrainedConfig) -> dict[str, float]:
    """Set every dropout and jitter of the configuration and its parts to 0; what they were."""
    silenced: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            silenced |= silence_config(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, int | float) and value is not True and value:
            if (config.model_type, name) in _USED_IN_INFERENCE:
                continue
            setattr(config, name, type(value)(0))
            silenced[name] = float(value)
    return silenced


def silence_modules(module: nn.Module) -> dict[str, float]:
    """Modules that draw at random whatever the configuration says: dropouts of their own, by their probability, and
    routers, which stay in inference mode."""
    silenced: dict[str, float] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p:
            silenced[name] = part.p
            part.p = 0.0
        elif type(part).__name__ in _DRAWING_ROUTERS:
            part.register_forward_pre_hook(_in_inference_mode)
    return silenced


def _in_inference_mode(module: nn.Module, _: Any) -> None:
    module.training = False
