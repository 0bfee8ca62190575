"""The norm of all gradients, and what they are clipped by. Floor 2."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

ROW = 1 << 14
"""So many numbers are summed in float32 at a time on a CPU."""


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm over all of them together, a float64 scalar; 0 without any.

    A CPU adds the squares of a float32 tensor one by one in float32: of 4 million numbers the norm is off by 1e-4, of
    32 million by 2e-3. So rows of `ROW` numbers are summed in float32, which is off by 1e-7, and their norms in
    float64. A GPU sums in a tree and needs no such care.
    """
    given = list(gradients)
    if not given or given[0].device.type != "cpu":
        return get_total_norm(given).double()
    norm: Tensor = vector_norm(torch.stack([_norm(gradient) for gradient in given]))
    return norm


def clip(weights: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scales gradients that have this norm together down to `limit`."""
    with_gradient = [weight for weight in weights if weight.grad is not None]
    if with_gradient:
        clip_grads_with_norm_(with_gradient, limit, norm.to(with_gradient[0].dtype))


def _norm(gradient: Tensor) -> Tensor:
    flat = gradient.detach().reshape(-1)
    norm: Tensor
    if flat.numel() <= ROW:
        norm = vector_norm(flat).double()
        return norm
    whole = flat.numel() - flat.numel() % ROW
    rows = vector_norm(flat[:whole].view(-1, ROW), dim=1)
    norm = vector_norm(torch.cat([rows, vector_norm(flat[whole:])[None]]).double())
    return norm
