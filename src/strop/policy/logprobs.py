"""Hidden states to the log-probs of the tokens that came: the head, in chunks that never hold [M, V]. Floor 2.

Shapes: M scored tokens, D width, V vocabulary, R rows of one chunk.

z = h W^T + b,  y = cap(scale z),  logp = y[target] - logsumexp(y).  With p = softmax(y), gradients are
d logp / d z = (onehot(target) - p) * scale * cap'(scale z), rows of which are held for one chunk at a time. Where the
head does not train, the product of these rows with W, [M, D], is kept in the forward pass, which has the chunk's
softmax at hand, and the backward pass is one multiplication (any loss is a function of the logps, so nothing else is
needed). Where it trains, the backward pass computes every chunk again.

Where it is asked for, log(sum of p^2) = logsumexp(2 y) - 2 logsumexp(y) is taken from the same chunk, without
gradients.

Matrix products run in the compute dtype; logsumexp, softmax and sums over chunks in float32 at least.
`naive_token_logps` is the same in three lines of plain torch, and stays as the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
"""R x V of one chunk by device, when nothing else is asked for: 128 MiB and 1 GiB of float32 logits."""
_FEWEST_ROWS = 64


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does between its head and the softmax: y = scale z, then cap tanh(y / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        y = z if self.scale == 1.0 else z * self.scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    def slope(self, y: Tensor) -> Tensor | float:
        """dy/dz, from y."""
        return self.scale if self.softcap is None else self.scale * (1 - (y / self.softcap).square())


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
    compute: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    collisions: bool = False,
) -> Tensor:
    """Natural log-probs of `targets`.

    Args:
        hidden: [M, D]. Its gradient has its own dtype.
        weight: [V, D], bias: [V] or None. Their gradients are summed over chunks in float32 at least.
        targets: [M] int64.
        compute: dtype of the matrix products; None: that of `hidden`.
        chunk_tokens: rows of one chunk; None: as many as `CHUNK_ELEMENTS` allows.
        collisions: return log(sum of p^2) too, without gradients.

    Returns:
        [M] float32, or float64 where `compute` is float64; with `collisions` [2, M].
    """
    if compute is None:
        compute = hidden.dtype
    if chunk_tokens is None:
        elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
        chunk_tokens = max(_FEWEST_ROWS, elements // weight.shape[0])
    keep_rows = torch.is_grad_enabled() and hidden.requires_grad and not _trains(weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        options = (transform, compute, chunk_tokens, keep_rows, collisions)
        logps, squares = _TokenLogps.apply(hidden, weight, bias, targets, *options)  # type: ignore[no-untyped-call]
        return torch.stack([logps, squares]) if collisions else logps


def naive_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform = LogitTransform(),
) -> Tensor:
    """The same through full logits [M, V] and autograd."""
    logits = transform(F.linear(hidden, weight, bias).to(_stats(hidden.dtype)))
    return F.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _stats(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    return (slice(i, i + chunk) for i in range(0, num_rows, chunk))


def _slopes(y: Tensor, lse: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """[R, V] d logp / d z, in place of y where it can be."""
    slope = transform.slope(y)
    rows = y.sub_(lse[:, None]).exp_().neg_()
    rows.scatter_add_(1, targets[:, None], torch.ones_like(lse)[:, None])
    return rows.mul_(slope)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        compute: torch.dtype,
        chunk: int,
        keep_rows: bool,
        collisions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        stats = _stats(compute)
        logps = torch.empty(len(targets), dtype=stats, device=hidden.device)
        lses = torch.empty_like(logps)
        squares = torch.empty_like(logps) if collisions else None
        kept = torch.empty_like(hidden) if keep_rows else None
        w, b = weight.to(compute), None if bias is None else bias.to(compute)
        for rows in _chunks(len(targets), chunk):
            y = transform(F.linear(hidden[rows].to(compute), w, b).to(stats))
            lses[rows] = torch.logsumexp(y, dim=-1)
            logps[rows] = y.gather(1, targets[rows, None]).squeeze(1) - lses[rows]
            if squares is not None:
                squares[rows] = torch.logsumexp(2 * y, dim=-1) - 2 * lses[rows]
            if kept is not None:
                kept[rows] = (_slopes(y, lses[rows], targets[rows], transform).to(compute) @ w).to(kept.dtype)
        ctx.transform, ctx.compute, ctx.chunk = transform, compute, chunk
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        ctx.save_for_backward(*((kept,) if kept is not None else (hidden, weight, bias, targets, lses)))
        return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 6
        if len(ctx.saved_tensors) == 1:
            (kept,) = ctx.saved_tensors
            return kept * grad[:, None].to(kept.dtype), None, None, *rest
        hidden, weight, bias, targets, lses = ctx.saved_tensors
        compute, stats = ctx.compute, _stats(ctx.compute)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        w, b = weight.to(compute), None if bias is None else bias.to(compute)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=stats, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(bias.shape, dtype=stats, device=bias.device) if wants_bias else None
        for rows in _chunks(len(targets), ctx.chunk):
            h = hidden[rows].to(compute)
            y = ctx.transform(F.linear(h, w, b).to(stats))
            dz = _slopes(y, lses[rows], targets[rows], ctx.transform).mul_(grad[rows, None])
            if d_bias is not None:
                d_bias += dz.sum(0)
            dz = dz.to(compute)
            if d_hidden is not None:
                d_hidden[rows] = (dz @ w).to(d_hidden.dtype)
            if d_weight is not None:
                if compute == stats:
                    d_weight.addmm_(dz.t(), h)
                else:
                    d_weight += dz.t() @ h
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *rest,
        )
