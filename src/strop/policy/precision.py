"""The dtypes in which a run computes and keeps its weights. Floor 2: configuration and device in, `Precision` out.

`bf16` and `fp16` mean: matrix products in 16 bits (torch.autocast), weights that train and the optimizer's state in
float32. Pure 16-bit weights round away updates of a learning rate of 5e-7. What does not train (the base under LoRA)
is stored in the compute dtype, since no update ever touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.config.sections import TrainingSection
from strop.errors import ConfigError
from strop.policy.kernels.product_rates import bf16_gains
from strop.readable import short_name

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of a run.

    compute: dtype of matrix products, and of weights that do not train. scaler: whether losses are scaled before the
    backward pass, which float16 needs, since its smallest number is 6e-8.
    """

    compute: torch.dtype
    scaler: bool = False

    @classmethod
    def of(cls, bf16: bool | None, fp16: bool | None) -> Precision:
        """bfloat16, float16 or, if both are off, float32."""
        return cls(torch.bfloat16) if bf16 else cls(torch.float16, scaler=True) if fp16 else cls(torch.float32)

    @property
    def master(self) -> torch.dtype:
        """dtype of weights that train and of the optimizer's state."""
        return torch.float32 if self.compute in _LOW else self.compute

    @property
    def is_low(self) -> bool:
        return self.compute in _LOW

    def of_head(self, fp32_logits: bool) -> torch.dtype:
        """dtype of the products of the head."""
        return torch.float32 if fp32_logits and self.is_low else self.compute

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """A block for forward passes: torch.autocast for 16 bits, nothing for float32 and float64."""
        return torch.autocast(device.type, dtype=self.compute) if self.is_low else nullcontext()

    def describe(self, adapters: bool) -> str:
        """One line of text: the dtypes of weights, products and optimizer."""
        master, compute = short_name(self.master), short_name(self.compute)
        weights = f"adapters {master} on a base in {compute}" if adapters else master
        scaled = ", with a gradient scaler" if self.scaler else ""
        return f"weights {weights}, compute {compute}{scaled}, optimizer {master}"


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    found = {name: t.detach() for name, t in tensors.items() if t.dtype in known and t.numel()}
    return [name for name, t in found.items() if not torch.stack(torch.aminmax(t)).isfinite().all()]


def resolve_precision(training: TrainingSection, device: torch.device) -> Precision:
    """What `training.bf16`, `fp16` and `auto_precision` mean on this device.

    `auto_precision` chooses bf16 on a GPU that has instructions for it, and on a CPU whose products are faster in it
    than in float32 (kernels/product_rates.py), if neither bf16 nor fp16 is given (false counts as given).

    Raises:
        ConfigError: the device cannot compute in the dtype that is asked for.
    """
    if device.type == "cpu":
        return choose_precision(training, bf16_gains)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return choose_precision(training, lambda: has_bf16, lambda: torch.cuda.get_device_name(device))


def choose_precision(
    training: TrainingSection, gains: Callable[[], bool], gpu: Callable[[], str] | None = None
) -> Precision:
    """`resolve_precision` for any device.

    Args:
        gains: returns whether bfloat16 is faster than float32 there.
        gpu: returns the name of the GPU; None: a CPU. A GPU without bfloat16 refuses it; a CPU computes it slowly.

    Raises:
        ConfigError: bf16 is set on a GPU that does not compute it.
    """
    bf16, fp16 = training.bf16, training.fp16
    if training.auto_precision and bf16 is None and fp16 is None:
        bf16 = gains()
    if bf16 and gpu and not gains():
        raise ConfigError(
            f"training.bf16 is true, but {gpu()} does not compute bfloat16",
            expected="a GPU of compute capability 8.0 or higher",
            fix="use --fp16 instead, or neither (float32)",
        )
    return Precision.of(bf16, fp16)
