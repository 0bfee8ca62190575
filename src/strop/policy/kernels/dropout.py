"""Dropout of what adapters see. Floor 2.

Every element of x is left out with probability p, independently of all others; the factor 1 / (1 - p) is the caller's.
What is kept for the backward pass is which elements are left out, and not a second x.

On a CPU a random number for every element costs more than the adapter's products. The distances between elements that
are left out are geometric, so that p as many numbers do. Measured for 1,000,000 elements and p = 0.05 on two cores of a
Zen 5: 0.7 ms, against 5 ms of torch's own dropout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEW = 0.2
"""Probability up to which places are drawn."""


def bytes_of_left_out(p: float, device_type: str) -> float:
    """What `draw_left_out` gives, in bytes per element of x."""
    return float(p > 0) if _by_mask(p, device_type) else 8 * p


def _by_mask(p: float, device_type: str) -> bool:
    return p > FEW or device_type != "cpu"


def draw_left_out(x: Tensor, p: float) -> Tensor:
    """Which elements of x are left out: few ones on a CPU by their places in x as it is written row by row, [about
    p x.numel()] int64 in ascending order; else a mask of x's shape."""
    if _by_mask(p, x.device.type):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p)
    expected = p * x.numel()
    places = geometric_places(int(expected + 5 * math.sqrt(expected)) + 8, p)
    while int(places[-1]) < x.numel():  # once in millions
        places = torch.cat([places, places[-1] + 1 + geometric_places(8, p)])
    return places[: int(torch.searchsorted(places, x.numel()))]


def geometric_places(count: int, p: float) -> Tensor:
    """[count] int64: the first places, in ascending order, of events that have probability p at every place."""
    return torch.empty(count, dtype=torch.int64).geometric_(p).cumsum_(0).sub_(1)


def without(x: Tensor, left_out: Tensor | None) -> Tensor:
    """A copy of x with zeros there; x itself where nothing is left out."""
    return x if left_out is None else zero_(x.clone(memory_format=torch.contiguous_format), left_out)


def zero_(x: Tensor, left_out: Tensor) -> Tensor:
    """Zeros there, in place where x lies row by row."""
    if left_out.dtype == torch.bool:
        return x.masked_fill_(left_out, 0)
    x = x.contiguous()
    x.view(-1).index_fill_(0, left_out, 0)
    return x
