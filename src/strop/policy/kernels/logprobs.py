"""Hidden states to the log-probs of the tokens that came: the head, tile by tile of the logits. Floor 2.

Shapes: M scored tokens, D width, V vocabulary; R rows and C columns of one tile.

z = h W^T + b,  y = cap(scale z),  logp = y[target] - logsumexp(y).  With p = softmax(y), gradients are
d logp / d z = (onehot(target) - p) * scale * cap'(scale z), and any loss is a function of the logps, so that these
slopes d logp / d z are all that a backward pass needs.

Going through the columns, each row keeps the largest y so far and the sum of exp(y - largest), and what was summed is
scaled when a larger one comes, as in the softmax of flash attention (arXiv 2205.14135, algorithm 1). Where the head
does not train, the forward pass accumulates p W in the same way and keeps each row's gradient, [M, D], for the backward
pass to multiply. Where it trains, the forward pass keeps as many logits as there is room for; the backward pass makes
gradients of them, knowing the softmax's sums, and computes the other logits again.

Where it is asked for, log(sum of p^2) is taken from the same tiles, without gradients.

Matrix products run in the compute dtype; softmax and sums over tiles in float32 at least. The logits of a tile are one
buffer for all tiles where that can be, and become what is multiplied next in place. The softmax goes over slabs of them
that stay in the processor's cache: passes over memory and fresh pages would cost more than the products.
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

from strop.policy.kernels.head_sizes import (
    gradient_columns,
    kept_logits,
    parts,
    product_dtype,
    slab_elements,
    sum_dtype,
    tile_shape,
)
from strop.policy.kernels.matmul import linear, takes_buffer
from strop.policy.kernels.weight_copies import WeightCopies
from strop.policy.model.logit_transform import UNCHANGED, LogitTransform

COLLISIONS = "collisions"
"""Name of the column of log(sum of p^2), the probability that two draws of a token are the same."""

Cast = Callable[[Tensor, torch.dtype], Tensor]
"""A weight in a dtype, without gradients."""


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform = UNCHANGED,
    compute: torch.dtype | None = None,
    cast: Cast | None = None,
    tile: tuple[int, int] | None = None,
    collisions: bool = False,
) -> Tensor:
    """Natural log-probs of `targets`.

    A row whose logits are -inf in all of a tile's columns gets NaN; -inf here and there is as good as any number.

    Args:
        hidden: [M, D], M >= 1. Its gradient has its own dtype.
        weight: [V, D], bias: [V] or None. Their gradients are summed in float32 at least.
        targets: [M] int64, from 0 to V - 1, which is not checked.
        compute: dtype of the matrix products, if this device has them; None: that of `hidden`.
        cast: gives weight and bias in the compute dtype; None: copies that are not kept.
        tile: rows and columns of one tile, at most; None: by device.
        collisions: return log(sum of p^2) too, without gradients.

    Returns:
        [M] float32, or float64 where `compute` is float64; with `collisions` [2, M].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if not len(targets) or hidden.shape != (len(targets), weight.shape[1]):
        shapes = f"hidden {[*hidden.shape]}, W {[*weight.shape]} and targets {[*targets.shape]}"
        raise ValueError(f"{shapes}: not [M, D], [V, D] and [M] with M >= 1")
    if compute is None:
        compute = hidden.dtype
    if (widened := product_dtype(compute, hidden.device.type)) != compute:
        compute, cast = widened, None  # W is widened for this call, and not kept
    tile = tile or tile_shape(len(targets), weight.shape[0], hidden.device.type, compute)
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    wants_gradients = torch.is_grad_enabled() and (trains or hidden.requires_grad)
    num_kept = kept_logits(len(targets), weight.shape[0], weight.shape[1], compute) if trains and wants_gradients else 0
    with torch.autocast(hidden.device.type, enabled=False):
        options = (
            transform,
            compute,
            cast or WeightCopies(),
            tile,
            wants_gradients and not trains,
            num_kept,
            collisions,
        )
        logps, log_squares = _TokenLogps.apply(hidden, weight, bias, targets, *options)  # type: ignore[no-untyped-call]
        return torch.stack([logps, log_squares]) if collisions else logps


def naive_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform = UNCHANGED,
) -> Tensor:
    """The same through full logits [M, V] and autograd."""
    logits = transform(F.linear(hidden, weight, bias).to(sum_dtype(hidden.dtype)))
    return F.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


@dataclass(slots=True)
class _Sums:
    """What rows know of the columns that they went through, [R, 1] each: the largest y; the sum of exp(y - largest) and
    of its square; y of the target."""

    highest: Tensor
    total: Tensor
    squares: Tensor
    at_target: Tensor

    @classmethod
    def none(cls, rows: int, like: Tensor) -> _Sums:
        zeros = [like.new_zeros(rows, 1) for _ in range(3)]
        return cls(like.new_full((rows, 1), -torch.inf), *zeros)

    def add(self, highest: Tensor, total: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add a tile's own. Returns what scales all that was summed before, and the mean under the tile's softmax."""
        new = torch.maximum(self.highest, highest)
        before, of_tile = (self.highest - new).exp_(), (highest - new).exp_().mul_(total)
        self.highest, self.total = new, self.total * before + of_tile
        if squares is not None:
            self.squares = self.squares * before.square() + squares * of_tile.square()
        return before, of_tile

    def logps(self) -> Tensor:
        """The largest is subtracted before the logarithm is, or a sure token's would be rounded as its logit is."""
        return (self.at_target - self.highest) - self.total.log()


class _Head:
    """One head in the compute dtype, and the buffers that its tiles share. h: [R, D]; targets: [R, 1]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, tile: tuple[int, int]) -> None:
        self.weight, self.bias, self.transform = weight, bias, transform
        self.stats = weight.new_empty(0, dtype=sum_dtype(weight.dtype))
        num_slab = slab_elements(tile, weight.device.type)
        self._slab_rows = num_slab // tile[1]
        self._probs = self.stats.new_empty(num_slab)
        # y is z where they are the same numbers
        self._exact = self.stats.new_empty(num_slab) if weight.dtype != self.stats.dtype or transform.changes else None
        self._tile = weight.new_empty(tile[0] * tile[1])
        self._product = weight.new_empty(tile[0] * weight.shape[1]) if takes_buffer(weight) else None

    def logits(self, h: Tensor, columns: slice, room: Tensor | None = None) -> Tensor:
        """z [R, C] in `room` or, without, valid until the next tile's."""
        weight, bias = self.weight[columns], None if self.bias is None else self.bias[columns]
        buffer = _shaped(self._tile, len(h), len(weight)) if room is None else room
        z = linear(h, weight, bias, buffer=buffer)
        return z if room is None or takes_buffer(weight) else room.copy_(z)

    def product(self, z: Tensor, columns: slice) -> Tensor:
        """z W [R, D] of a tile, valid until the next one's."""
        weight = self.weight[columns].t()
        return linear(z, weight, buffer=None if self._product is None else _shaped(self._product, len(z), len(weight)))

    def softmax(
        self, z: Tensor, places: _Places, sums: _Sums, *, squares: bool, keep_probs: bool
    ) -> tuple[Tensor, Tensor]:
        """Add a tile's logits to `sums`. keep_probs: put softmax(y) * dy/dz within the tile, 0 at targets, in the
        place of z. Returns what `_Sums.add` does."""
        highest, total, squared = (self.stats.new_empty(len(z), 1) for _ in range(3))
        for rows, y in self._slabs(z):
            probs = torch.softmax(y, dim=-1, out=_shaped(self._probs, *y.shape))
            highest[rows], total[rows] = y.amax(-1, keepdim=True), probs.amax(-1, keepdim=True).reciprocal_()
            sums.at_target[rows] = places[rows].found(y, sums.at_target[rows])
            if squares:
                squared[rows] = probs.square().sum(-1, keepdim=True)
            if keep_probs:
                if self.transform.changes:
                    probs.mul_(self.transform.slope(y))
                places[rows].put_(probs, 0.0)
                z[rows] = probs
        return sums.add(highest, total, squared if squares else None)

    def slopes(
        self, z: Tensor, places: _Places, highest: Tensor, total: Tensor, logps: Tensor, *, keep: bool
    ) -> Tensor:
        """- d logp / d z [R, C], valid until the next tile's; in place of z, unless that is kept. highest, total,
        logps: [R, 1] of all columns."""
        slopes = _shaped(self._tile, *z.shape) if keep else z
        for rows, y in self._slabs(z):
            probs = slopes[rows] if slopes.dtype == self.stats.dtype else _shaped(self._probs, *y.shape)
            torch.sub(y, highest[rows], out=probs).exp_().div_(total[rows])
            places[rows].put_(probs, logps[rows].expm1())  # p - 1, before any rounding to 16 bits
            if self.transform.changes:
                probs.mul_(self.transform.slope(y))
            if slopes.dtype != self.stats.dtype:
                slopes[rows] = probs
        return slopes

    def add_weight_gradient(self, total: Tensor, z: Tensor, h: Tensor, *, is_first: bool) -> None:
        """z^T h of a tile [C, D], in parts, so that there is no second [V, D] where a tile has all columns."""
        for columns in parts(len(total), gradient_columns(h.shape[1])):
            add = total[columns].copy_ if is_first else total[columns].add_
            add(linear(z.t()[columns], h.t()))

    def at_targets(self, targets: Tensor, sums: _Sums, logps: Tensor) -> Tensor:
        """The targets' own share of d logp / d h, [R, D]: (1 - p) dy/dz W[target]."""
        shares = -logps.expm1() * self.transform.slope(sums.at_target)
        return self.weight[targets.squeeze(1)].to(shares.dtype).mul_(shares)

    def _slabs(self, z: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, y) of slabs of the logits z."""
        for start in range(0, len(z), self._slab_rows):
            rows = slice(start, min(start + self._slab_rows, len(z)))
            part = z[rows]
            if self._exact is None:
                yield rows, part
            else:
                yield rows, self.transform.apply_(_shaped(self._exact, *part.shape).copy_(part))


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a tile has its rows' targets: `inside` [R, 1], and `column` [R, 1], any where it is not inside."""

    inside: Tensor
    column: Tensor

    @classmethod
    def of(cls, targets: Tensor, columns: slice) -> _Places:
        inside = (targets >= columns.start) & (targets < columns.stop)
        return cls(inside, (targets - columns.start).clamp_(0, columns.stop - columns.start - 1))

    def __getitem__(self, rows: slice) -> _Places:
        return _Places(self.inside[rows], self.column[rows])

    def found(self, y: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(self.inside, y.gather(1, self.column), otherwise)

    def put_(self, y: Tensor, values: Tensor | float) -> None:
        y.scatter_(1, self.column, torch.where(self.inside, values, y.gather(1, self.column)))


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The start of a flat buffer, [rows, columns] without gaps."""
    return buffer[: rows * columns].view(rows, columns)


def _tiles(
    num_rows: int, vocabulary: int, tile: tuple[int, int], kept: Tensor
) -> Iterator[tuple[slice, list[tuple[slice, Tensor | None]]]]:
    """Rows, and for them columns and the room that `kept` has for the tile's logits, while it lasts."""
    end = 0
    for rows in parts(num_rows, tile[0]):
        tiles: list[tuple[slice, Tensor | None]] = []
        for columns in parts(vocabulary, tile[1]):
            shape = rows.stop - rows.start, columns.stop - columns.start
            start, end = end, end + shape[0] * shape[1]
            tiles.append((columns, _shaped(kept[start:], *shape) if end <= len(kept) else None))
        yield rows, tiles


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
        tile: tuple[int, int],
        keep_products: bool,
        num_kept: int,
        collisions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        low_bias = None if bias is None else cast(bias, compute)
        head = _Head(cast(weight, compute), low_bias, transform, tile)
        logps, highest, total, log_squares = (head.stats.new_empty(len(targets)) for _ in range(4))
        products = torch.empty_like(hidden) if keep_products else None
        kept = head.weight.new_empty(num_kept)
        for rows, tiles in _tiles(len(targets), len(weight), tile, kept):
            h, own = hidden[rows].to(compute), targets[rows, None]
            sums = _Sums.none(len(h), head.stats)
            product = head.stats.new_zeros(h.shape) if keep_products else None
            for columns, room in tiles:
                z, places = head.logits(h, columns, room), _Places.of(own, columns)
                factors = head.softmax(z, places, sums, squares=collisions, keep_probs=keep_products)
                if product is not None:
                    product.mul_(factors[0]).addcmul_(head.product(z, columns).to(product.dtype), factors[1])
            logps[rows], highest[rows], total[rows] = sums.logps()[:, 0], sums.highest[:, 0], sums.total[:, 0]
            if collisions:
                log_squares[rows] = (sums.squares.log() - 2 * sums.total.log())[:, 0]
            if products is not None and product is not None:
                products[rows] = head.at_targets(own, sums, logps[rows, None]).sub_(product.div_(sums.total))
        ctx.transform, ctx.compute, ctx.cast, ctx.tile = transform, compute, cast, tile
        if collisions:
            ctx.mark_non_differentiable(log_squares)
        saved = (hidden, weight, bias, targets, kept, highest, total, logps)
        ctx.save_for_backward(*((products,) if products is not None else saved))
        return logps, log_squares if collisions else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        saved = ctx.saved_tensors  # once: whoever packs them may unpack them once
        if len(saved) == 1:
            (products,) = saved
            return products * grad[:, None].to(products.dtype), None, None, *rest
        hidden, weight, bias, targets, kept, highest, total, logps = saved
        compute, stats = ctx.compute, sum_dtype(ctx.compute)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        low_bias = None if bias is None else ctx.cast(bias, compute)
        head = _Head(ctx.cast(weight, compute), low_bias, ctx.transform, ctx.tile)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.empty(weight.shape, dtype=stats, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(bias.shape, dtype=stats, device=bias.device) if wants_bias else None
        for rows, tiles in _tiles(len(targets), len(weight), ctx.tile, kept):
            factors = grad[rows, None].neg()  # on the narrow sides of the products, not on [R, C]
            h, scaled = hidden[rows].to(compute), (hidden[rows] * factors).to(compute)
            d_h = head.stats.new_zeros(h.shape) if wants_hidden else None
            for columns, room in tiles:
                z = head.logits(h, columns) if room is None else room
                places = _Places.of(targets[rows, None], columns)
                known = highest[rows, None], total[rows, None], logps[rows, None]
                z = head.slopes(z, places, *known, keep=room is not None)
                if d_bias is not None:
                    d_bias[columns] += linear(factors.t().to(compute), z.t())[0]
                if d_h is not None:
                    d_h += head.product(z, columns)
                if d_weight is not None:
                    head.add_weight_gradient(d_weight[columns], z, scaled, is_first=rows.start == 0)
            if d_hidden is not None and d_h is not None:
                d_hidden[rows] = d_h.mul_(factors).to(d_hidden.dtype)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *rest,
        )
