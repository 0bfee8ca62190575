"""What a model does between its head and the softmax. Floor 2.

A configuration names it (`logit_transform`); the loaded model is asked (`measured_transform`): its head is made to give
known numbers, and what becomes of them is looked at. That shows a cap or a factor under any name and in any precision,
where log-probs would show it only if rounding did not hide it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Of logits z: y = scale z, then cap tanh(y / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def changes(self) -> bool:
        return self != UNCHANGED

    def at_temperature(self, temperature: float) -> LogitTransform:
        """What divides its result by the temperature."""
        cap = None if self.softcap is None else self.softcap / temperature
        return LogitTransform(self.scale / temperature, cap)

    def describe(self) -> str:
        """For a person."""
        return f"times {self.scale:g}" + ("" if self.softcap is None else f", capped at {self.softcap:g}")

    def __call__(self, z: Tensor) -> Tensor:
        y = z if self.scale == 1.0 else z * self.scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    def apply_(self, z: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, y: Tensor) -> Tensor | float:
        """dy/dz, from y."""
        return self.scale if self.softcap is None else (y / self.softcap).square_().neg_().add_(1).mul_(self.scale)


UNCHANGED = LogitTransform()
_FACTORS: Mapping[str, bool] = {
    "logit_scale": False,  # cohere
    "logits_scaling": True,  # granite; minicpm, which divides the head's input
    "lm_head_multiplier": False,  # falcon_h1
    "output_multiplier": False,
    "logits_scale": False,
    "logit_multiplier": False,
}
"""Factors by name; true: what it divides by."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcapping", "logits_softcap")


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """Scale and soft cap of a model's logits, as its configuration names them; the probe at load checks it."""
    text = config.get_text_config()
    scale = 1.0
    for name, divides in _FACTORS.items():
        value = getattr(text, name, None)
        if isinstance(value, int | float) and value:
            scale *= 1 / value if divides else value
    cap = next((value for name in _CAPS if isinstance(value := getattr(text, name, None), int | float) and value), None)
    return LogitTransform(float(scale), None if cap is None else float(cap))


@dataclass
class Passed:
    """What came to a model's head in one of its own forward passes: the body's last hidden states, and what the head
    was given."""

    body: Tensor | None = None
    given: Tensor | None = None


def measured_transform(
    model: Any, body: nn.Module, inputs: Mapping[str, Any], named: LogitTransform
) -> LogitTransform | None:
    """The transform that the model applies to its logits. `named` if the model does that, else the measured one.

    None if it is neither a factor nor a soft cap, or if it treats entries of the vocabulary differently. For the
    measurement the head's output is replaced by known float32 numbers from small to large.
    """
    head, passed = model.get_output_embeddings(), Passed()
    rows = head.weight.shape[0]
    ramp = torch.logspace(-3, 3.3, rows) * (1 - 2 * (torch.arange(rows) % 2))

    def give(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        passed.given = args[0]
        return ramp.to(out.device).expand(out.shape).clone()

    def see(_: nn.Module, args: Any, out: Any) -> None:
        passed.body = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]

    hooks = [head.register_forward_hook(give), body.register_forward_hook(see)]
    try:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    finally:
        for hook in hooks:
            hook.remove()
    if passed.given is None or passed.body is None or logits.shape[-1] != rows:
        return named  # its head is not called as a module: the log-probs alone can tell
    before = _factor(passed.given, passed.body)
    made, near = logits.float().cpu(), max(2e-3, torch.finfo(logits.dtype).eps)
    if before is None or not torch.equal(made, made[:1].expand(made.shape)):
        return None
    return _fitting(ramp, made[0], before, named, near)


def _factor(given: Tensor, body: Tensor) -> float | None:
    """What the body's output is multiplied by before the head; None where it is something else."""
    if given.shape != body.shape:
        return None
    x, h = given.double().flatten(), body.double().flatten()
    factor = float((x * h).sum() / h.square().sum().clamp_min(1e-30))
    near = 4 * torch.finfo(given.dtype).eps
    return factor if torch.allclose(x, factor * h, rtol=near, atol=near * float(h.abs().max())) else None


def _fitting(ramp: Tensor, made: Tensor, before: float, named: LogitTransform, near: float) -> LogitTransform | None:
    """The transform that makes `made` of the ramp, where `before` was done before the head: `named`, or one by its
    slope at 0 and its largest value. near: relative."""
    few = max(1, len(ramp) // 10)  # the smallest of the ramp, which no cap changes
    slope = float((made[:few] * ramp[:few]).sum() / ramp[:few].square().sum())
    largest = float(made.abs().max())
    capped = largest < 0.9 * abs(slope) * float(ramp.abs().max())
    found = LogitTransform(slope * before, largest if capped else None)
    for candidate in (named, found):
        if before and torch.allclose(candidate(ramp / before), made, rtol=near, atol=near * 1e-2):
            return candidate
    return None
