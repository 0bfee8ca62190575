"""The entropy of a head's distribution at every token, tile by tile of the logits. Floor 2.

Shapes: M tokens, D width, V vocabulary; R rows and C columns of one tile.

With y the logits, p = softmax(y) and H = - sum of p log p,  d H / d y = - p (log p + H).

A tile that holds the share w of the probability and has the entropy h within adds w (h - log w) to H, so that one pass
is enough. The backward pass makes the logits again: no [M, V] is ever kept. This is not a part of `logprobs.py`, which
every step goes through, since few steps ask for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.policy.kernels.head_sizes import parts, product_dtype, small_tile, sum_dtype
from strop.policy.kernels.logprobs import Cast
from strop.policy.kernels.matmul import linear
from strop.policy.kernels.weight_copies import WeightCopies
from strop.policy.model.logit_transform import UNCHANGED, LogitTransform

ENTROPIES = "entropies"
"""A column per token: the entropy of the distribution that it came of."""


def token_entropies(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transform: LogitTransform = UNCHANGED,
    compute: torch.dtype | None = None,
    cast: Cast | None = None,
) -> Tensor:
    """The entropy of the distribution of the next token after each hidden state, in nats.

    Args:
        hidden, weight, bias, transform, compute, cast: as `token_logps` takes them.

    Returns:
        [M] float32, or float64 where `compute` is float64.
    """
    if compute is None:
        compute = hidden.dtype
    if (widened := product_dtype(compute, hidden.device.type)) != compute:
        compute, cast = widened, None
    with torch.autocast(hidden.device.type, enabled=False):
        return _Entropies.apply(hidden, weight, bias, transform, compute, cast or WeightCopies())  # type: ignore[no-untyped-call, no-any-return]


def naive_token_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, transform: LogitTransform = UNCHANGED
) -> Tensor:
    """The same through full logits [M, V] and autograd."""
    log_p = transform(torch.nn.functional.linear(hidden, weight, bias)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        compute: torch.dtype,
        cast: Cast,
    ) -> Tensor:
        ctx.transform, ctx.compute, ctx.cast = transform, compute, cast
        low, low_bias = cast(weight, compute), None if bias is None else cast(bias, compute)
        entropies, log_totals = (hidden.new_empty(len(hidden), dtype=sum_dtype(compute)) for _ in range(2))
        ctx.tile = tile = small_tile(hidden.device.type)
        for rows in parts(len(hidden), tile[0]):
            h, logs, within = hidden[rows].to(compute), [], []
            for columns in parts(len(weight), tile[1]):
                y = _logits(h, low, low_bias, columns, transform)
                logs.append(y.logsumexp(-1))
                within.append(torch.special.entr(torch.softmax(y, -1)).sum(-1))
            of_tiles = torch.stack(logs, -1)
            log_totals[rows] = of_tiles.logsumexp(-1)
            shares = torch.softmax(of_tiles, -1)
            entropies[rows] = (shares * torch.stack(within, -1) + torch.special.entr(shares)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, log_totals, entropies)
        return entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, log_totals, entropies = ctx.saved_tensors
        compute, stats = ctx.compute, sum_dtype(ctx.compute)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        low, low_bias = ctx.cast(weight, compute), None if bias is None else ctx.cast(bias, compute)
        d_hidden = torch.zeros(hidden.shape, dtype=stats, device=hidden.device) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=stats, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(weight.shape[:1], dtype=stats, device=weight.device) if wants_bias else None
        for rows in parts(len(hidden), ctx.tile[0]):
            h = hidden[rows].to(compute)
            for columns in parts(len(weight), ctx.tile[1]):
                y = _logits(h, low, low_bias, columns, ctx.transform)
                p = torch.exp(y - log_totals[rows, None])
                slopes = torch.special.entr(p).sub_(p.mul_(entropies[rows, None]))
                slopes.mul_(ctx.transform.slope(y)).mul_(grad[rows, None])
                narrow = slopes.to(compute)
                if d_hidden is not None:
                    d_hidden[rows] += linear(narrow, low[columns].t())
                if d_weight is not None:
                    d_weight[columns] += linear(narrow.t(), h.t())
                if d_bias is not None:
                    d_bias[columns] += slopes.sum(0)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 3,
        )


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, transform: LogitTransform) -> Tensor:
    """y [R, C]."""
    z = linear(h, weight[columns], None if bias is None else bias[columns])
    return transform(z.to(sum_dtype(z.dtype)))
