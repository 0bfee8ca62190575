"""Matrix products outside autograd, by the library that does them fastest. Floor 2.

On CPUs torch gives float32 products to MKL, which on processors of other makers leaves the wide vector units unused;
oneDNN, which does those in 16 bits anyway, does not. Measured on two cores of a Zen 5: 160 GFLOP/s against 400. Neither
rounds what it multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

LARGE = 2**26
"""Multiplications of a product from which oneDNN is worth the kernel that it makes, and keeps, for every new shape."""


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, buffer: Tensor | None = None) -> Tensor:
    """x w^T + bias: [T, O] of x [T, I], w [O, I] and bias [O], in the dtype that all have. buffer: [T or more, O] that
    the result is written to, but by oneDNN, which cannot."""
    if _by_onednn(x, w):
        if bias is None and _swaps(x, w):
            return linear(w, x).t()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(w), bias, "none", [], "")
        return y
    out = None if buffer is None else buffer[: len(x)]
    return torch.mm(x, w.t(), out=out) if bias is None else torch.addmm(bias, x, w.t(), out=out)


def linear_add(total: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """total + x w^T, which may or may not be in the place of total."""
    if _by_onednn(x, w):
        if _swaps(x, w):
            return linear_add(total.t(), w, x).t()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(total), _dense(w), None, "add")
        return y
    return total.addmm_(x, w.t())


def _by_onednn(x: Tensor, w: Tensor) -> bool:
    large = x.numel() * len(w) >= LARGE
    return large and _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"


def _swaps(x: Tensor, w: Tensor) -> bool:
    """Whether w x^T is faster: oneDNN copies a first factor that lies column by column, so it should be the small
    one."""
    return x.stride(0) == 1 and x.shape[1] > 1 and len(w) < len(x)


def _dense(x: Tensor) -> Tensor:
    """Without gaps, by rows or by columns: for anything else oneDNN has only its reference, a hundred times slower."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
