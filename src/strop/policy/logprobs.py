"""Hidden states to the log-probs of the tokens that came: the head, chunk by chunk of tokens. Floor 2.

Shapes: M scored tokens, D width, V vocabulary, R rows of one chunk.

z = h W^T + b,  y = cap(scale z),  logp = y[target] - logsumexp(y).  With p = softmax(y), gradients are
d logp / d z = (onehot(target) - p) * scale * cap'(scale z), and any loss is a function of the logps, so that these
slopes are all that a backward pass needs. The forward pass, which has the softmax at hand, makes them chunk by chunk.
Where the head does not train, it keeps their product with W, [M, D], and the backward pass is one multiplication. Where
it trains, it keeps the slopes of as many chunks as there is room for, and the backward pass makes the others again.

Where it is asked for, log(sum of p^2) is taken from the same chunk, without gradients.

Matrix products run in the compute dtype; logsumexp, softmax and sums over chunks in float32 at least. The logits of a
chunk become its slopes in place, where they are not kept, and are one buffer for all chunks where that can be.
The softmax goes over slabs of them that stay in the processor's cache: passes over memory and fresh pages would cost
more than the products.
`naive_token_logps` is the same in three lines of plain torch, and stays as the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.policy.casts import Casts
from strop.policy.matmul import computes, linear, takes_buffer

CHUNK_ROWS = 256
"""Rows of one chunk of 16-bit logits on a CPU, half as many of float32: few enough for a buffer that stays in memory
which the process has, many enough that reading W costs less than multiplying with it."""
CHUNK_ELEMENTS = 2**26
"""R x V of one chunk on other devices: 128 MiB of 16-bit logits, and twice 256 MiB of float32 beside them."""
SLAB_ELEMENTS = 2**20
"""Logits that go through the softmax at once on a CPU, and elements of W's gradient that a product is added to: 4 MiB
of float32."""

KEPT_GRADIENTS = 2
"""Memory for the slopes of a head that trains, in gradients of its W: half of what W, its gradient and the optimizer's
state take. Training all of a model of 135 million weights takes 5 % less time with it."""

Cast = Callable[[Tensor, torch.dtype], Tensor]
"""A weight in a dtype, without gradients."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does between its head and the softmax: y = scale z, then cap tanh(y / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        y = z if self.scale == 1.0 else z * self.scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    def apply_(self, z: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

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
    cast: Cast | None = None,
    chunk_tokens: int | None = None,
    collisions: bool = False,
) -> Tensor:
    """Natural log-probs of `targets`.

    Args:
        hidden: [M, D]. Its gradient has its own dtype.
        weight: [V, D], bias: [V] or None. Their gradients are summed over chunks in float32 at least.
        targets: [M] int64.
        compute: dtype of the matrix products, if this device has them; None: that of `hidden`.
        cast: gives weight and bias in the compute dtype; None: copies that are not kept.
        chunk_tokens: rows of one chunk; None: by device.
        collisions: return log(sum of p^2) too, without gradients.

    Returns:
        [M] float32, or float64 where `compute` is float64; with `collisions` [2, M].
    """
    if compute is None:
        compute = hidden.dtype
    if (widened := product_dtype(compute, hidden.device.type)) != compute:
        compute, cast = widened, None  # W is widened for this call, and not kept
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(weight.shape[0], hidden.device.type, compute)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    wants_slopes = torch.is_grad_enabled() and (trains or hidden.requires_grad)
    num_kept = kept_rows(len(targets), weight.shape[1], chunk_tokens, compute) if trains and wants_slopes else 0
    with torch.autocast(hidden.device.type, enabled=False):
        options = (transform, compute, cast or Casts(), chunk_tokens, wants_slopes and not trains, num_kept, collisions)
        logps, squares = _TokenLogps.apply(hidden, weight, bias, targets, *options)  # type: ignore[no-untyped-call]
        return torch.stack([logps, squares]) if collisions else logps


def product_dtype(compute: torch.dtype, device_type: str) -> torch.dtype:
    """What the head multiplies in where a model computes in `compute`: float32 on a processor that has no instructions
    for 16 bits and would widen W for every chunk."""
    return torch.float32 if device_type == "cpu" and not computes(compute) else compute


def chunk_rows(vocabulary: int, device_type: str, compute: torch.dtype) -> int:
    """Rows of one chunk at most."""
    if device_type == "cpu":
        return CHUNK_ROWS * 2 // compute.itemsize
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)


def kept_rows(num_rows: int, width: int, chunk: int, compute: torch.dtype) -> int:
    """Rows whose slopes [V] are kept where the head trains: all of them, or whole chunks."""
    room = KEPT_GRADIENTS * width * _stats(compute).itemsize // compute.itemsize
    return num_rows if num_rows <= room else room // chunk * chunk


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


def _stats(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(num_rows: int, chunk: int, start: int = 0) -> Iterator[slice]:
    return (slice(i, min(i + chunk, num_rows)) for i in range(start, num_rows, chunk))


class _Head:
    """One head in the compute dtype, and the buffers that its chunks share. h: [R, D] of one chunk."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, rows: int) -> None:
        self.weight, self.bias, self.transform = weight, bias, transform
        slab = max(1, SLAB_ELEMENTS // weight.shape[0]) if weight.device.type == "cpu" else rows
        shape = (min(slab, rows), weight.shape[0])
        stats = _stats(weight.dtype)
        self.probs = torch.empty(shape, dtype=stats, device=weight.device)
        # transformed logits of another dtype stand beside those of which they are made; of the same, in their place
        self.exact = torch.empty_like(self.probs) if weight.dtype != stats else None
        self.logits = weight.new_empty(rows, weight.shape[0]) if takes_buffer(weight) else None

    def score(
        self,
        h: Tensor,
        targets: Tensor,
        logps: Tensor,
        squares: Tensor | None,
        *,
        wants_slopes: bool,
        room: Tensor | None = None,
    ) -> Tensor:
        """Write log-probs [R], and `squares` where there is room for them. Returns - d logp / d z [R, V], if they are
        wanted: in `room` or, without, valid until the next chunk's."""
        z = linear(h, self.weight, self.bias, buffer=self.logits)
        slopes = z if room is None else room
        for rows, y, probs in self._slabs(z):
            # the largest probability is at least 1 / V, so that its logarithm is safe; the logits are subtracted before
            # it is added, or a sure token's log-prob would be rounded as its logit is
            logps[rows] = (y.gather(1, targets[rows, None]).squeeze(1) - y.amax(-1)) + probs.amax(-1).log_()
            if squares is not None:
                squares[rows] = probs.square().sum(-1).log_()
            if wants_slopes:
                self._slopes_(slopes[rows], y, probs, targets[rows])
        return slopes

    def slopes(self, h: Tensor, targets: Tensor) -> Tensor:
        """- d logp / d z [R, V]; valid until the next chunk's."""
        z = linear(h, self.weight, self.bias, buffer=self.logits)
        for rows, y, probs in self._slabs(z):
            self._slopes_(z[rows], y, probs, targets[rows])
        return z

    def _slabs(self, z: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, y, softmax of y) of slabs of the logits z [R, V], in buffers that the next slab takes."""
        for rows in _chunks(len(z), len(self.probs)):
            y = z[rows] if self.exact is None else self.exact[: len(z[rows])].copy_(z[rows])
            self.transform.apply_(y)
            yield rows, y, torch.softmax(y, dim=-1, out=self.probs[: len(y)])

    def _slopes_(self, slopes: Tensor, y: Tensor, probs: Tensor, targets: Tensor) -> None:
        """Write - d logp / d z of a slab to `slopes`, which may be its logits. Takes `probs`."""
        slope = self.transform.slope(y)
        at_target = 1 - probs.gather(1, targets[:, None])  # before any rounding to 16 bits
        at_target.mul_(slope.gather(1, targets[:, None]) if isinstance(slope, Tensor) else slope)
        if isinstance(slope, Tensor) or slope != 1.0:
            probs.mul_(slope)
        probs.scatter_(1, targets[:, None], at_target.neg_())  # on 16 bits, torch copies all of z there and back
        slopes.copy_(probs)


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
        cast: Cast,
        chunk: int,
        keep_products: bool,
        num_kept: int,
        collisions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logps = torch.empty(len(targets), dtype=_stats(compute), device=hidden.device)
        squares = torch.empty_like(logps) if collisions else None
        products = torch.empty_like(hidden) if keep_products else None
        low_bias = None if bias is None else cast(bias, compute)
        head = _Head(cast(weight, compute), low_bias, transform, min(chunk, len(targets)))
        kept = head.weight.new_empty(num_kept, len(weight))
        for rows in _chunks(len(targets), chunk):
            room = kept[rows] if rows.stop <= num_kept else None
            of_chunk = None if squares is None else squares[rows]
            wanted = keep_products or room is not None
            h = hidden[rows].to(compute)
            z = head.score(h, targets[rows], logps[rows], of_chunk, wants_slopes=wanted, room=room)
            if products is not None:
                products[rows] = linear(z, head.weight.t()).to(products.dtype).neg_()
        ctx.transform, ctx.compute, ctx.cast, ctx.chunk = transform, compute, cast, chunk
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        ctx.save_for_backward(*((products,) if products is not None else (hidden, weight, bias, targets, kept)))
        return logps, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        if len(ctx.saved_tensors) == 1:
            (products,) = ctx.saved_tensors
            return products * grad[:, None].to(products.dtype), None, None, *rest
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        compute, stats = ctx.compute, _stats(ctx.compute)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        low_bias = None if bias is None else ctx.cast(bias, compute)
        head = _Head(ctx.cast(weight, compute), low_bias, ctx.transform, min(ctx.chunk, len(targets)))
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.empty(weight.shape, dtype=stats, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(bias.shape, dtype=stats, device=bias.device) if wants_bias else None

        def all_slopes() -> Iterator[tuple[slice, Tensor]]:
            if len(kept):
                yield slice(0, len(kept)), kept
            for rows in _chunks(len(targets), ctx.chunk, len(kept)):
                yield rows, head.slopes(hidden[rows].to(compute), targets[rows])

        for rows, z in all_slopes():
            factors = grad[rows, None].neg()  # on the narrow sides of the products, not on [R, V]
            if d_bias is not None:
                d_bias += linear(factors.t().to(compute), z.t())[0]
            if d_hidden is not None:
                d_hidden[rows] = (linear(z, head.weight.t()) * factors).to(d_hidden.dtype)
            if d_weight is not None:
                _add_product(d_weight, z, (hidden[rows] * factors).to(compute), first=rows.start == 0)
            del z  # before the next chunk's
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *rest,
        )


def _add_product(total: Tensor, z: Tensor, h: Tensor, *, first: bool) -> None:
    """Add z^T h to the total [V, D], which is empty at first; on a CPU slab by slab, so that what is added is not
    written to memory before."""
    size = max(1, SLAB_ELEMENTS // h.shape[1]) if total.device.type == "cpu" else len(total)
    for rows in _chunks(len(total), size):
        part = linear(z[:, rows].t(), h.t())
        if first:
            total[rows] = part
        else:
            total[rows] += part
