"""The optimizer, its state as named tensors, and the learning rate as a function of the step. Floor 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strop.config.sections import TrainingSection
from strop.errors import ConfigError


class _Kind(NamedTuple):
    """Of an optimizer of bitsandbytes: the name of its class, and the bytes of its state per trained weight."""

    name: str
    state: int


BITSANDBYTES: Mapping[str, _Kind] = {
    "adamw_8bit": _Kind("AdamW8bit", 2),
    "ademamix": _Kind("AdEMAMix", 12),
    "ademamix_8bit": _Kind("AdEMAMix8bit", 3),
    "lion_8bit": _Kind("Lion8bit", 1),
    "lion_32bit": _Kind("Lion32bit", 4),
    "paged_adamw_8bit": _Kind("PagedAdamW8bit", 2),
    "paged_adamw_32bit": _Kind("PagedAdamW32bit", 8),
    "paged_lion_8bit": _Kind("PagedLion8bit", 1),
    "paged_lion_32bit": _Kind("PagedLion32bit", 4),
}
"""By `training.optim`. The paged ones keep their state where the driver of a GPU moves it to the host's memory when
room is short; on a CPU nothing is paged."""


def state_bytes(optim: str, wide: int) -> int:
    """Bytes of optimizer state per trained weight. wide: bytes of the weight itself."""
    if optim in BITSANDBYTES:
        return BITSANDBYTES[optim].state
    # adafactor keeps one number per row and one per column
    return {"sgd": 0, "adafactor": 1}.get(optim, 2 * wide)


RATE_FACTOR = "rate_factor"
"""In a group of an optimizer: what the learning rate is multiplied by."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], training: TrainingSection, loraplus_lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `training.optim` over `parameters`. Weight decay leaves vectors (norms, biases) out.

    Args:
        loraplus_lr_ratio: what the learning rate of the second matrices of adapters is multiplied by; None: 1.

    Raises:
        ConfigError: an optimizer of bitsandbytes without that package.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = training.weight_decay if parameter.ndim >= 2 else 0.0
        is_second = ".lora_B." in name or ".lora_embedding_B" in name
        factor = (loraplus_lr_ratio or 1.0) if is_second else 1.0
        groups.setdefault((decay, factor), []).append(parameter)
    found = [
        {"params": params, "weight_decay": decay, RATE_FACTOR: factor} for (decay, factor), params in groups.items()
    ]
    assert training.learning_rate is not None
    lr = training.learning_rate
    match training.optim:
        case "adamw_torch" | "adamw_torch_fused":
            return torch.optim.AdamW(found, lr=lr, fused=training.optim == "adamw_torch_fused")
        case "sgd":
            return torch.optim.SGD(found, lr=lr)
        case "adafactor":
            return torch.optim.Adafactor(found, lr=lr)
    require_optimizer(training)
    import bitsandbytes as bnb

    optimizer = getattr(bnb.optim, BITSANDBYTES[training.optim].name)(found, lr=lr)
    if all(weight.device.type == "cpu" for weight in parameters.values()):
        optimizer.is_paged = False  # as BITSANDBYTES says; bitsandbytes would warn of it
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step, in each group times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE_FACTOR]


def require_optimizer(training: TrainingSection) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        ConfigError: an optimizer of bitsandbytes without that package.
    """
    if training.optim in BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "the package bitsandbytes is not installed",
            where=f"training.optim: {training.optim}",
            expected="bitsandbytes, which is the extra `bnb`",
            fix="pip install -e '.[bnb]' in strop's folder, or choose optim: adamw_torch_fused",
        )


def learning_rate(step: int, num_steps: int, training: TrainingSection) -> float:
    """The rate of step `step` (from 1) of `num_steps`: linear warm-up to the peak, then the schedule.

    No step has a rate of 0: the first one has peak / warm-up steps, and linear and cosine would reach 0 one step after
    the last.
    """
    assert training.learning_rate is not None
    warmup = warmup_steps(num_steps, training)
    if step <= warmup:
        return training.learning_rate * step / warmup
    left = (num_steps - step + 1) / max(1, num_steps - warmup)
    match training.lr_scheduler:
        case "constant":
            factor = 1.0
        case "linear":
            factor = left
        case "cosine":
            factor = 0.5 * (1 - math.cos(math.pi * left))
    return training.learning_rate * factor


def warmup_steps(num_steps: int, training: TrainingSection) -> int:
    """Steps of warm-up, computed from `warmup_ratio` if that is given."""
    if training.warmup_ratio is not None:
        return math.ceil(training.warmup_ratio * num_steps)
    assert training.warmup_steps is not None
    return training.warmup_steps


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the optimizer by name: its tensors, to save or to load into, and its plain numbers.

    An optimizer creates the state of a weight at the first step in which the weight has a gradient. Weights without
    state take an empty step here (zero gradients, rate 0), which does not change them. So the state is complete
    whenever it is saved or loaded, whichever weights have had gradients so far.
    """
    _complete_state(optimizer)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{key}.{name}"] = value
    return tensors, numbers


def set_optimizer_numbers(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], numbers: Mapping[str, Any]
) -> None:
    """Puts the plain numbers of `optimizer_tensors` back into the optimizer."""
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key in state:
            full = f"optimizer.{key}.{name}"
            if full in numbers:
                state[key] = numbers[full]


def without_gradient(parameters: Mapping[str, nn.Parameter], most: int = 4) -> str | None:
    """A sentence that names the weights which the last backward pass gave no gradient; None if there are none. A
    gradient of 0 counts as a gradient."""
    names = [name for name, parameter in parameters.items() if parameter.grad is None]
    if not names:
        return None
    shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return (
        f"{len(names)} of {len(parameters)} trained tensors got no gradient and stay unchanged: {shown}. "
        "The log-probs do not depend on them (they may be layers for images or sound)"
    )


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    fresh = [p for p in gradients if not optimizer.state.get(p)]
    if not fresh:
        return
    for p in gradients:
        p.grad = None  # the optimizer skips weights without a gradient, so weights that have state are not touched
    for p in fresh:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for p in fresh:  # the empty step must not count: Adam's bias correction starts with the first real one
        state = optimizer.state[p]
        if isinstance(count := state.get("step"), Tensor):
            count.zero_()
        elif count is not None:
            state["step"] = 0
    for p, gradient in gradients.items():
        p.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
