"""Products of linear layers with and without LoRA, forward and backward, outside autograd. Floor 2.

Shapes: T tokens, I inputs, O outputs of a layer, r its adapter's rank.

    y = x W^T + b + s (x A^T) B^T

Several layers may read the same x (q, k and v; gate and up): their A are one product, and their gradients of x are
added inside the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.policy.matmul import linear, linear_add


@dataclass(frozen=True, slots=True)
class Weights:
    """What one linear layer multiplies with, in the compute dtype: w [O, I], bias [O], a [r, I], b [O, r]."""

    w: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        """0 without an adapter."""
        return 0 if self.a is None else len(self.a)

    def scaled(self, low: Tensor) -> Tensor:
        """In place."""
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


def products(layers: Sequence[Weights], x: Tensor, seen: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Outputs [T, O] of layers that read the same x [T, I], and their s x A^T side by side. seen: x as the adapters
    see it."""
    outputs = [linear(x, layer.w, layer.bias) for layer in layers]
    a = _all_a(layers)
    lows = None if a is None else linear(seen, a)
    for i, (layer, low) in enumerate(zip(layers, _by_layer(layers, lows, 1), strict=True)):
        if low is not None and layer.b is not None:
            outputs[i] = linear_add(outputs[i], layer.scaled(low), layer.b)
    return outputs, lows


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of x, of x as the adapters see it (where that is another tensor), and of w, bias, a, b of every layer."""

    x: Tensor | None
    seen: Tensor | None
    weights: list[Tensor | None]


def gradients(
    layers: Sequence[Weights],
    grads: Sequence[Tensor],
    trains: Sequence[bool],
    x: Tensor | None,
    seen: Tensor | None,
    lows: Tensor | None,
    *,
    wants_x: bool,
    apart: bool = False,
) -> Gradients:
    """Back through `products`. trains: of w, bias, a, b of every layer. apart: `seen` is another tensor than x."""
    a = _all_a(layers)
    d_lows = [n.scaled(linear(g, n.b.t())) for n, g in zip(layers, grads, strict=True) if n.b is not None]
    d_low = None if not d_lows else d_lows[0] if len(d_lows) == 1 else torch.cat(d_lows, 1)
    d_x = None
    if wants_x:
        d_x = linear(grads[0], layers[0].w.t())
        for layer, grad in zip(layers[1:], grads[1:], strict=True):
            d_x = linear_add(d_x, grad, layer.w.t())
        if d_low is not None and a is not None and not apart:
            d_x = linear_add(d_x, d_low, a.t())
    d_seen = linear(d_low, a.t()) if apart and wants_x and d_low is not None and a is not None else None
    d_a = linear(d_low.t(), seen.t()) if any(trains[2::4]) and d_low is not None and seen is not None else None
    weights: list[Tensor | None] = []
    parts = zip(grads, _by_layer(layers, d_a, 0), _by_layer(layers, lows, 1), strict=True)
    for i, (grad, its_d_a, low) in enumerate(parts):
        w, bias, _, b = trains[4 * i : 4 * i + 4]
        weights.append(linear(grad.t(), x.t()) if w and x is not None else None)
        weights.append(grad.sum(0) if bias else None)
        weights.append(its_d_a)
        weights.append(grad.t() @ low if b and low is not None else None)
    return Gradients(d_x, d_seen, weights)
