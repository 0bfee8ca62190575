"""What a model does between its head and the softmax. Floor 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Of logits z: y = scale z, then cap tanh(y / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def changes(self) -> bool:
        return self != UNCHANGED

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


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """Scale and soft cap of a model's logits, as its configuration names them; the probe at load checks it."""
    text = config.get_text_config()
    scale = 1.0
    for name, inverse in (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False)):
        value = getattr(text, name, None)
        if isinstance(value, int | float):
            scale *= 1 / value if inverse else value
    cap = getattr(text, "final_logit_softcapping", None)
    return LogitTransform(float(scale), None if cap is None else float(cap))
