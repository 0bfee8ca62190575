"""Attention over shared-prefix rows by matrix products over tiles of queries. Floor 2.

Shapes: T packed tokens, H query heads, K key-value heads, n = H / K, D width of a head, R queries of a tile, N keys.

A row holds sequences. The first is the prompt with its first completion; each other completion is one more, and its
queries see the prompt's keys and its own. The queries of a sequence are cut into tiles. A tile is multiplied by the one
or two spans of keys that it may see. Only the triangle of later keys at the end of the last span is computed and then
masked. A tile is one product for all heads: the n query heads of a key-value head are rows of one matrix, so keys are
never repeated.

Short sequences of a group share a tile, where the scores between them, masked too, cost less than the calls of further
tiles.

The forward pass keeps q, k and v, and the probabilities of the first tiles, as many as there is room for; those of the
others the backward pass computes again. It adds the gradients of keys that several tiles see in float32 at least. On
CPUs these few large products beat the fused kernel, whose inner products gain nothing from bfloat16; measured: 2.5
times in bfloat16, 1.1 times in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.batch import GroupSpan
from strop.policy.kernels.matmul import bmm

TILE_ROWS = {torch.bfloat16: 256, torch.float16: 256}
"""Queries of a tile, at most; larger tiles suit faster products and waste larger triangles."""
WIDE_TILE_ROWS = 160  # float32 and float64
TILE_SCORES = 2**18
"""Scores of one key-value head in a tile, at most: what a processor's own cache holds."""

SHARED_WASTE = 2**11
"""Scores per head that a sequence may waste to share a tile with those before it: about what the calls of a tile of its
own take."""

KEPT_BYTES = 2**15
"""Probabilities of one layer that are kept for the backward pass, a token of the row, at most: 32 KiB."""

Span = tuple[int, int]
"""Packed tokens from start to stop."""


@dataclass(frozen=True, slots=True)
class Tile:
    """queries: a span. keys: one span or two. mask: [R, last keys], 0 where a key may be seen and -inf where not; all
    keys before these are seen by all queries."""

    queries: Span
    keys: tuple[Span, ...]
    mask: Tensor


@dataclass(frozen=True, slots=True)
class CausalSpan:
    """What is causal in itself: its own tokens, and those of a prompt before it (none: an empty span)."""

    prompt: Span
    own: Span


def sequences(layout: tuple[GroupSpan, ...]) -> Iterator[CausalSpan]:
    """The sequences of a row, whose own spans follow each other without a gap."""
    for span in layout:
        prompt = (span.start, span.start + span.prompt)
        stop = prompt[1] + span.completions[0]
        yield CausalSpan((span.start, span.start), (span.start, stop))
        for length in span.completions[1:]:
            if length:
                yield CausalSpan(prompt, (stop, stop + length))
            stop += length


def cut_tiles(
    layout: tuple[GroupSpan, ...], window: int | None, repeats: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tile, ...]:
    """The tiles of a row. window: None, or how many positions back a token sees, itself included. repeats: query heads
    of a key-value head."""
    triangles: dict[int, Tensor] = {}
    masks: dict[tuple[int, ...], Tensor] = {}
    tiles = []

    def most_rows(keys: int) -> int:
        return max(1, min(TILE_ROWS.get(dtype, WIDE_TILE_ROWS), TILE_SCORES // (repeats * keys)))

    for together in chain.from_iterable(_shared(tuple(sequences((span,))), most_rows) for span in layout):
        if len(together) > 1:
            tiles.append(_shared_tile(together, window, dtype, device, masks))
            continue
        [sequence] = together
        before = sequence.prompt[1] - sequence.prompt[0]
        start, stop = sequence.own
        keys_seen = before + stop - start if window is None else min(window, before + stop - start)
        most = most_rows(keys_seen)
        parts = -(-(stop - start) // most)
        rows = -(-(stop - start) // parts)
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            position = before + first - start
            unseen = 0 if window is None else max(0, position - window + 1)  # positions that none of them sees
            spans = ((sequence.prompt[0] + unseen, sequence.prompt[1]), (start + max(0, unseen - before), last))
            keys = tuple(span for span in spans if span[0] < span[1])
            if window is not None and before + last - start > window:
                mask = _mask(position, last - first, unseen, window, dtype, device)
            else:
                if last - first not in triangles:
                    triangles[last - first] = _mask(0, last - first, 0, None, dtype, device)
                mask = triangles[last - first]
            tiles.append(Tile((first, last), keys, mask))
    return tuple(tiles)


def _shared(group: Sequence[CausalSpan], most_rows: Callable[[int], int]) -> Iterator[list[CausalSpan]]:
    """The sequences of a group, those that share a tile together. most_rows: of a tile, by its keys."""
    found: list[CausalSpan] = []
    for sequence in group:
        if found:
            rows, own = sequence.own[0] - found[0].own[0], sequence.own[1] - sequence.own[0]
            keys = found[0].prompt[1] - found[0].prompt[0] + rows + own
            if 2 * own * rows > SHARED_WASTE or rows + own > most_rows(keys):
                yield found
                found = []
        found.append(sequence)
    if found:
        yield found


def _shared_tile(
    together: Sequence[CausalSpan],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    masks: dict[tuple[int, ...], Tensor],
) -> Tile:
    """One tile of several sequences that follow each other. masks: those that are made, by the lengths of their parts.

    Its mask is of all its keys. The prompt's part is its own number 0, where its queries are in the tile, too.
    """
    first, prompt = together[0], together[1].prompt
    has_prompt = first.own[0] == prompt[0]
    shape = (int(has_prompt), prompt[1] - prompt[0], *(s.own[1] - s.own[0] for s in together))
    keys = ((first.own[0], together[-1].own[1]),) if has_prompt else (prompt, (first.own[0], together[-1].own[1]))
    if shape not in masks:
        lengths = [shape[1], *shape[2:]]
        if has_prompt:
            lengths[1] -= shape[1]
        part = torch.repeat_interleave(torch.tensor(lengths, device=device))
        offset = torch.cat([torch.arange(n, device=device) for n in lengths])
        position = torch.where(part > 0, offset + shape[1], offset)
        rows = slice(0 if has_prompt else shape[1], None)
        distance = position[rows, None] - position
        seen = ((part[rows, None] == part) | (part == 0)) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        masks[shape] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return Tile((first.own[0], together[-1].own[1]), keys, masks[shape])


def _mask(position: int, rows: int, key: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, keys] for queries from `position` on and keys from position `key` to the last query's."""
    last = position + rows
    distance = torch.arange(position, last, device=device)[:, None] - torch.arange(key, last, device=device)
    unseen = distance < 0
    if window is not None:
        unseen |= distance >= window
    return torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scaling: float) -> Tensor:
    """q: [1, H, T, D]; k, v: [1, K, T, D] of one dtype. Returns [1, H, T, D], laid out as [1, T, H, D]."""
    room = KEPT_BYTES * q.shape[2] if torch.is_grad_enabled() else 0
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _TiledAttention.apply(q, k, v, tiles, scaling, room)  # type: ignore[no-untyped-call]
    return out


def _gather(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """[K, N, D] of [K, T, D]."""
    parts = [x[:, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _by_key_head(x: Tensor, span: Span, heads: int, factor: float | None = None) -> Tensor:
    """[K, n R, D] of a span of [H, T, D], times `factor`."""
    rows = x[:, span[0] : span[1]]
    if factor is not None:
        rows = torch.mul(rows, factor, out=rows.new_empty(rows.shape))
    return rows.reshape(heads, -1, x.shape[-1])


def _put(out: Tensor, span: Span, rows: Tensor, factor: float = 1.0) -> None:
    """[K, n R, D] times `factor` into a span of [T, H, D]."""
    heads, length = rows.shape[0], span[1] - span[0]
    to = out[span[0] : span[1]].view(length, heads, -1, rows.shape[-1])
    torch.mul(rows.view(heads, -1, length, rows.shape[-1]).permute(2, 0, 1, 3), factor, out=to)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[K, n R, N] of scaled q [K, n R, D] and k [K, N, D]."""
    scores = bmm(q, k.transpose(1, 2))
    rows, keys = mask.shape
    scores.view(len(k), -1, rows, k.shape[1])[..., k.shape[1] - keys :].add_(mask)
    return torch.softmax(scores, dim=-1)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scaling: float, room: int
    ) -> Tensor:
        keys, values = k[0], v[0]
        out = torch.empty(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        kept: list[Tensor] = []
        for tile in tiles:
            rows = _by_key_head(q[0], tile.queries, len(keys), scaling)
            probs = _probabilities(rows, _gather(keys, tile.keys), tile.mask)
            _put(out, tile.queries, bmm(probs, _gather(values, tile.keys)))
            room -= probs.nbytes
            if room >= 0:
                kept.append(probs)
        ctx.tiles, ctx.scaling = tiles, scaling
        ctx.save_for_backward(q, k, v, *kept)
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        keys, values = k[0], v[0]
        stats = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.empty(q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
        d_k, d_v = (torch.zeros(x[0].shape, dtype=stats, device=q.device) for x in (k, v))
        for i, tile in enumerate(ctx.tiles):
            rows = _by_key_head(q[0], tile.queries, len(keys), ctx.scaling)
            g_rows = _by_key_head(grad[0], tile.queries, len(keys))
            its_keys, its_values = _gather(keys, tile.keys), _gather(values, tile.keys)
            probs = kept[i] if i < len(kept) else _probabilities(rows, its_keys, tile.mask)
            d_probs = bmm(g_rows, its_values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            _put(d_q, tile.queries, bmm(d_scores, its_keys), ctx.scaling)
            _add(d_k, tile.keys, bmm(d_scores.transpose(1, 2), rows))
            _add(d_v, tile.keys, bmm(probs.transpose(1, 2), g_rows))
        return d_q.transpose(0, 1)[None], d_k[None].to(k.dtype), d_v[None].to(v.dtype), None, None, None


def _add(total: Tensor, spans: tuple[Span, ...], part: Tensor) -> None:
    """Add [K, N, D] to spans of [K, T, D]."""
    at = 0
    for start, stop in spans:
        total[:, start:stop] += part[:, at : at + stop - start]
        at += stop - start
