"""Products of linear layers with and without LoRA, forward and backward, outside autograd. Floor 2.

Shapes: T tokens, I inputs, O outputs of a layer, r its adapter's rank.

    y = x W^T + b + s (x A^T) B^T

Several layers may read the same x (q, k and v; gate and up): their A are one product, and their gradients of x are
added inside the products. With dropout every adapter sees an x of its own, and has its own product.

Where products of 16 bits are made in float32 (matmul.py), what several products read is widened once, and what they add
up to is rounded once; of the weights, the results and their gradients one layer's at a time is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.policy.kernels.dropout import without, zero_
from strop.policy.kernels.matmul import linear, linear_add, wide
from strop.policy.kernels.quantised_weights import QuantisedWeight

LeftOut = Sequence[Tensor | None]
"""By layer, what its adapter does not see of x: as `draw_left_out` has it, or None for nothing."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What one linear layer multiplies with, in the compute dtype: w [O, I], bias [O], a [r, I], b [O, r]."""

    w: Tensor | QuantisedWeight
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    def whole(self) -> Tensor:
        """w as a tensor, in the dtype of `wide`. A quantised one is made anew: let go of it after its product."""
        return wide(self.w) if isinstance(self.w, Tensor) else self.w.wide()

    @property
    def rank(self) -> int:
        """0 without an adapter."""
        return 0 if self.a is None else len(self.a)

    def scaled(self, low: Tensor) -> Tensor:
        """`low` times the scale, computed in place."""
        return low if self.scale == 1.0 else low.mul_(self.scale)


def _all_a(layers: Sequence[Weights]) -> Tensor | None:
    """[sum of r, I] the adapters' A below each other, so that layers of one input need one product."""
    parts = [layer.a for layer in layers if layer.a is not None]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_layer(layers: Sequence[Weights], lows: Tensor | None, dim: int) -> list[Tensor | None]:
    """The layers' parts of what has all their ranks along `dim`."""
    if lows is None:
        return [None] * len(layers)
    parts = iter(torch.split(lows, [layer.rank for layer in layers if layer.rank], dim))
    return [next(parts) if layer.rank else None for layer in layers]


def products(layers: Sequence[Weights], x: Tensor, left_out: LeftOut) -> tuple[list[Tensor], Tensor | None]:
    """Outputs [T, O] of layers that read the same x [T, I], and their s x A^T side by side."""
    dtype, x = x.dtype, wide(x)
    if _apart(left_out):
        parts = [linear(without(x, out), wide(n.a)) for n, out in zip(layers, left_out, strict=True) if n.a is not None]
        lows = _beside(parts)
    else:
        a = _all_a(layers)
        lows = None if a is None else linear(x, wide(a))
    outputs = []
    for layer, low in zip(layers, _by_layer(layers, lows, 1), strict=True):
        y = linear(x, layer.whole(), None if layer.bias is None else wide(layer.bias))
        if low is not None and layer.b is not None:
            y = linear_add(y, layer.scaled(low), wide(layer.b))
        outputs.append(y.to(dtype))
    return outputs, None if lows is None else lows.to(dtype)


def _apart(left_out: LeftOut) -> bool:
    """Whether the adapters see different x."""
    return any(out is not None for out in left_out)


def _beside(parts: Sequence[Tensor]) -> Tensor | None:
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat([*parts], 1)


@dataclass(frozen=True, slots=True)
class ProductGradients:
    """Of x, and of w, bias, a, b of every layer."""

    x: Tensor | None
    weights: list[Tensor | None]


def gradients(
    layers: Sequence[Weights],
    grads: Sequence[Tensor],
    trains: Sequence[bool],
    x: Tensor | None,
    lows: Tensor | None,
    left_out: LeftOut,
    *,
    wants_x: bool,
) -> ProductGradients:
    """Back through `products`. trains: of w, bias, a, b of every layer; x may be None where neither w nor a does."""
    dtype = grads[0].dtype
    x = None if x is None else wide(x)
    d_x: Tensor | None = None
    d_lows = []
    weights: list[Tensor | None] = []
    for i, (layer, low) in enumerate(zip(layers, _by_layer(layers, lows, 1), strict=True)):
        grad = wide(grads[i])
        w, bias, _, b = trains[4 * i : 4 * i + 4]
        if layer.b is not None:
            d_lows.append(layer.scaled(linear(grad, wide(layer.b).t())))
        if wants_x:
            d_x = linear(grad, layer.whole().t()) if d_x is None else linear_add(d_x, grad, layer.whole().t())
        weights.append(linear(grad.t(), x.t()) if w and x is not None else None)
        weights.append(grad.sum(0) if bias else None)
        weights.append(None)
        weights.append(linear(grad.t(), wide(low).t()) if b and low is not None else None)
    read = x if any(trains[2::4]) else None
    through = _through_each_a if _apart(left_out) else _through_all_a
    d_x, weights[2::4] = through(layers, d_lows, d_x, read, left_out)
    return ProductGradients(None if d_x is None else d_x.to(dtype), weights)


def _through_all_a(
    layers: Sequence[Weights], d_lows: Sequence[Tensor], d_x: Tensor | None, x: Tensor | None, _: LeftOut
) -> tuple[Tensor | None, list[Tensor | None]]:
    """d_x with what comes through the adapters, and their d_a; all adapters see x."""
    a, d_low = _all_a(layers), _beside(d_lows)
    if a is None or d_low is None:
        return d_x, [None] * len(layers)
    if d_x is not None:
        d_x = linear_add(d_x, d_low, wide(a).t())
    return d_x, _by_layer(layers, None if x is None else linear(d_low.t(), x.t()), 0)


def _through_each_a(
    layers: Sequence[Weights], d_lows: Sequence[Tensor], d_x: Tensor | None, x: Tensor | None, left_out: LeftOut
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The same where something is left out."""
    rest, d_as = iter(d_lows), []
    for layer, out in zip(layers, left_out, strict=True):
        d_a = None
        if layer.a is not None:
            d_low = next(rest)
            if d_x is not None:
                through = linear(d_low, wide(layer.a).t())
                d_x = d_x.add_(through if out is None else zero_(through, out))
            d_a = None if x is None else linear(d_low.t(), without(x, out).t())
        d_as.append(d_a)
    return d_x, d_as
