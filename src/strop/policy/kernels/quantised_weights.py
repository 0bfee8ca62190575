"""Weights in 4 or 8 bits (bitsandbytes, torchao), dequantised for one product at a time. Floor 2.

A dequantised weight is never kept: the backward pass makes it again. So of all the layers of a model, one weight at a
time lies in memory in 16 or 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strop.policy.kernels.matmul import widens

INT8_STEPS = 127.0


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes, or one whose weight is torchao's."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).__module__.startswith("bitsandbytes.") or is_of_torchao(module.weight)


def is_of_torchao(weight: Tensor) -> bool:
    """Whether it is one of torchao's tensors."""
    return type(weight).__module__.startswith("torchao.")


def is_in_bytes(layer: nn.Module) -> bool:
    """Whether a quantised layer has a byte per weight (bitsandbytes' 8 bits, all of torchao's); else two share one."""
    return type(layer).__name__ == "Linear8bitLt" or is_of_torchao(layer.weight)  # type: ignore[arg-type]


def multiplies_in(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a quantised layer computes in `dtype` when it is given that. One in 4 bits may be set to another."""
    return is_in_bytes(layer) or getattr(layer, "compute_dtype", None) in (None, dtype)


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """The weight [O, I] of a quantised layer, for products in `dtype`.

    Args:
        packed: as it lies in memory, on the layer's device.
        state: scales [O] of 8 bits, or bitsandbytes' QuantState of 4 bits; None: a tensor of torchao's knows its own.
    """

    packed: Tensor
    state: Any
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """[O, I] dequantised anew, in `dtype`."""
        if self.state is None:
            return torchao_dense(self.packed, self.dtype)
        if isinstance(self.state, Tensor):
            return int8_dense(self.packed, self.state, self.dtype)
        return int4_dense(self.packed, self.state, self.dtype)

    def wide(self) -> Tensor:
        """The same in the dtype that `matmul.linear` multiplies in, which on a CPU may be float32 for 16 bits: made at
        once, not rounded in between. On a CPU it may lie in memory that the next one is made in: for one product."""
        if self.packed.device.type != "cpu":
            return self.whole()
        own = replace(self, dtype=torch.float32) if widens(self.dtype) else self
        return own._in_parts() if own._has_parts else own.whole()

    @property
    def _has_parts(self) -> bool:
        """Whether it is large, in bitsandbytes' 4 bits, and can be cut between rows."""
        if self.state is None or isinstance(self.state, Tensor) or self.packed.dtype != torch.uint8:
            return False
        return (
            self.packed.numel() > PART
            and len(self.state.shape) == 2
            and self.state.shape[1] % self.state.blocksize == 0
        )

    def _in_parts(self) -> Tensor:
        """[O, I] in memory that is used again: a fresh block for every weight costs as much as dequantising it, since
        the system clears its pages. Parts are small enough to lie in the heap."""
        rows, inside = self.state.shape
        dense = _reused(rows * inside, self.dtype).view(rows, inside)
        packed, scales = self.packed.reshape(-1), scales_of(self.state)
        step = max(1, PART // inside)
        for first in range(0, rows, step):
            some = slice(first, min(first + step, rows))
            begin, end = some.start * inside, some.stop * inside
            own = scales[begin // self.state.blocksize : end // self.state.blocksize]
            shape = (some.stop - some.start, inside)
            dense[some] = _dense(packed[begin // 2 : end // 2], own, self.state, shape, self.dtype)
        return dense


PART = 2**17
"""Weights that are dequantised at once where a large weight is cut."""
_MEMORY: dict[torch.dtype, Tensor] = {}


def _reused(count: int, dtype: torch.dtype) -> Tensor:
    """So many numbers in memory that is kept, as large as the largest weight so far."""
    if dtype not in _MEMORY or _MEMORY[dtype].numel() < count:
        _MEMORY[dtype] = torch.empty(count, dtype=dtype)
    return _MEMORY[dtype][:count]


def quantised_weight(layer: nn.Module, dtype: torch.dtype) -> QuantisedWeight:
    """That of a quantised layer."""
    weight: Any = layer.weight
    if is_of_torchao(weight):
        return QuantisedWeight(weight.data, None, dtype)
    if is_in_bytes(layer):
        return QuantisedWeight(weight.data, weight.SCB, dtype)
    # a weight that was sharded and gathered again has lost its state; the layer has it, too
    state = getattr(weight, "quant_state", None) or layer.quant_state
    return QuantisedWeight(weight.data, state, dtype)


def int4_dense(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """[O, I] of a weight in 4 bits; rounded once, to `dtype`. state: bitsandbytes' QuantState."""
    return _dense(packed, scales_of(state), state, state.shape, dtype)


def scales_of(state: Any) -> Tensor:
    """float32, one for each block of a weight in 4 bits, in its order."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise  # slow to import

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


def _dense(packed: Tensor, scales: Tensor, state: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, state.blocksize, state.quant_type, shape, dtype
    )
    return dense


def int8_dense(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, I] of weight [O, I] int8 and scales [O], the largest of each row."""
    return weight.to(dtype).mul_((scales.to(weight.device) / INT8_STEPS).to(dtype)[:, None])


def torchao_dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """[O, I] of a tensor of torchao's: what it stands for in the dtype that its files were made of."""
    return weight.dequantize().to(dtype)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """x [..., I] times a quantised weight, which gets no gradient. Neither x nor the dequantised weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.whole())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.whole(), None


class DequantisingForward:
    """The forward of a layer in bytes: its weight dequantised, in the dtype of autocast, or in that of x."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer, kind = self.layer, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y: Tensor = _Product.apply(x.to(dtype), quantised_weight(layer, dtype))  # type: ignore[no-untyped-call]
            return y if layer.bias is None else y + layer.bias.to(dtype)
