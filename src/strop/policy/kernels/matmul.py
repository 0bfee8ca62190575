"""Matrix products outside autograd, each the way that is fastest on this processor (product_rates.py). Floor 2.

float32: torch gives it to MKL, which leaves the wide vector units of other makers' processors than Intel's unused;
oneDNN does not. Measured on two cores, in GFLOP/s: of a Zen 5 160 by MKL and 400 by oneDNN; of a Cascade Lake, in one
sitting, 160 and 130; of a Zen 3, which has no wide ones, 130 and 125. Neither rounds what it multiplies.

16 bits: where a processor has no instructions, or slow ones, the factors are widened to float32, which rounds nothing,
and the result is rounded once, as it is by those instructions. On two cores of a Cascade Lake torch's emulation does 50
GFLOP/s in bfloat16 and 1 to 20 in float16, and float32 150 and, while its neighbours rest, 240.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.policy.kernels.product_rates import by_onednn, way

LARGE = 2**26
"""Multiplications of a product from which oneDNN is worth the kernel that it makes, and keeps, for every new shape."""


def widens(dtype: torch.dtype, kind: str = "linear") -> bool:
    """Whether a CPU's products of this kind ("linear" or "batched") are made in float32 and rounded."""
    return dtype.itemsize == 2 and way(dtype, kind) == "widened"


def keeps_kernels(dtype: torch.dtype) -> bool:
    """Whether large products of `dtype` on this processor are oneDNN's, which keeps a kernel for every shape."""
    if dtype.itemsize != 2 or widens(dtype):
        return way(torch.float32) == "onednn" and dtype != torch.float64
    return torch.backends.mkldnn.is_available()  # type: ignore[no-any-return, no-untyped-call]


def takes_buffer(w: Tensor) -> bool:
    """Whether `linear` writes large products with w to the buffer that it is given."""
    return not (w.dtype == torch.float32 and w.device.type == "cpu" and way(torch.float32) == "onednn")


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, buffer: Tensor | None = None) -> Tensor:
    """x w^T + bias: [T, O] of x [T, I], w [O, I] and bias [O], in the dtype that all have. buffer: [T or more, O] that
    the result is written to, but by oneDNN, which cannot (`takes_buffer`)."""
    out = None if buffer is None else buffer[: len(x)]
    if _widens(x):
        y = linear(x.float(), w.float(), None if bias is None else bias.float())
        return y.to(x.dtype) if out is None else out.copy_(y)
    if _by_onednn(x, w):
        if bias is None and _swaps(x, w):
            return linear(w, x).t()
        return by_onednn(_dense(x), _dense(w), None if bias is None else _dense(bias))
    return torch.mm(x, w.t(), out=out) if bias is None else torch.addmm(bias, x, w.t(), out=out)


def linear_add(total: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """total + x w^T, which may or may not be written into total."""
    if _widens(x):
        return total.copy_(linear_add(total.float(), x.float(), w.float()))
    if _by_onednn(x, w):
        if _swaps(x, w):
            return linear_add(total.t(), w, x).t()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(total), _dense(w), None, "add")
        return y
    return total.addmm_(x, w.t())


def bmm(x: Tensor, y: Tensor) -> Tensor:
    """torch's own, of [B, T, I] and [B, I, O]."""
    return torch.bmm(x.float(), y.float()).to(x.dtype) if _widens(x, "batched") else torch.bmm(x, y)


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which `linear` multiplies: for whoever multiplies it more than once, or adds products before
    they are rounded."""
    return x.float() if _widens(x) else x


def _widens(x: Tensor, kind: str = "linear") -> bool:
    return x.device.type == "cpu" and widens(x.dtype, kind)


def _by_onednn(x: Tensor, w: Tensor) -> bool:
    return x.numel() * len(w) >= LARGE and not takes_buffer(w)


def _swaps(x: Tensor, w: Tensor) -> bool:
    """Whether w x^T is faster: oneDNN copies a first factor that lies column by column, so it should be the small
    one."""
    return x.stride(0) == 1 and x.shape[1] > 1 and len(w) < len(x)


def _dense(x: Tensor) -> Tensor:
    """Without gaps, by rows or by columns: for any other matrix oneDNN has only its reference, a hundred times slower,
    and a bias it reads as if there were none."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
