"""Masks of shared-prefix rows against their definition, and what the attention refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from strop.batch import GroupSpan
from strop.errors import ModelError
from strop.policy.kernels import tiled_attention
from strop.policy.kernels.attention import (
    KERNELS,
    AttentionPlan,
    SoftmaxRules,
    dense_mask,
    group_mask,
    shared_prefix_attention,
)

CPU = torch.device("cpu")
LAYOUT = (GroupSpan(0, 3, (2, 0, 4)), GroupSpan(9, 1, (0,)), GroupSpan(10, 5, (3, 1)))


def sees(query: int, key: int, window: int | None) -> bool:
    """The definition, token by token: who am I, who is that, may I see it."""

    def place(token: int) -> tuple[int, int, int]:  # group, part (0 is the prompt), position
        for g, span in enumerate(LAYOUT):
            start = span.start
            for part, length in enumerate((span.prompt, *span.completions)):
                if start <= token < start + length:
                    return g, part, token - start + (span.prompt if part else 0)
                start += length
        raise AssertionError(token)

    (g, part, position), (other_g, other_part, other_position) = place(query), place(key)
    if g != other_g or other_part not in (0, part) or other_position > position:
        return False
    return window is None or position - other_position < window


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_masks_are_their_definition(window: int | None) -> None:
    mask = dense_mask(LAYOUT, CPU, window)
    n = LAYOUT[-1].stop
    assert mask.tolist() == [[sees(q, k, window) for k in range(n)] for q in range(n)]
    for span in LAYOUT:
        own = slice(span.start, span.stop)
        assert torch.equal(group_mask(span, CPU, window), mask[own, own])


def test_a_plan_makes_each_mask_once() -> None:
    plan = AttentionPlan(LAYOUT, CPU)
    assert plan.mask(0, None) is plan.mask(0, None)
    assert plan.mask(0, 2) is plan.mask(0, 2)
    assert plan.dense(None) is plan.dense(None)
    assert not torch.equal(plan.mask(0, None), plan.mask(0, 2))


def test_keys_are_gathered_sequence_by_sequence() -> None:
    """What flash attention gets, and a GPU alone would show otherwise."""
    plan = AttentionPlan(LAYOUT, CPU)
    lengths = plan.lengths
    parts = torch.arange(LAYOUT[-1].stop).split(lengths.parts)
    gathered = torch.cat([parts[i] for i in lengths.gathered]).tolist()
    want = [([*range(*s.prompt), *range(*s.own)], [*range(*s.own)]) for s in tiled_attention.sequences(LAYOUT)]
    assert gathered == [token for seen, _ in want for token in seen]
    keys, queries = ([len(part[i]) for part in want] for i in (0, 1))
    assert (lengths.longest_keys, lengths.longest_queries) == (max(keys), max(queries))
    for starts, sizes in ((lengths.keys, keys), (lengths.queries, queries)):
        assert starts.dtype == torch.int32 and starts.diff().tolist() == sizes and starts[0] == 0


@pytest.mark.parametrize("window", [None, 2])
def test_a_bias_is_its_mask(window: int | None) -> None:
    plan = AttentionPlan(LAYOUT, CPU)
    for group in range(len(LAYOUT)):
        bias = plan.bias(group, window, torch.float16)
        assert plan.bias(group, window, torch.float16) is bias and bias.stride() == (16, 1)
        assert torch.equal(bias == 0, plan.mask(group, window)) and bool((bias <= 0).all())


def test_the_default_scale_is_that_of_the_width() -> None:
    plan = AttentionPlan((GroupSpan(0, 4, (2,)),), CPU)
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    one, _ = shared_prefix_attention(nn.Module(), q, k, v, None, strop_plan=plan)
    two, _ = shared_prefix_attention(nn.Module(), q, k, v, None, scaling=8**-0.5, strop_plan=plan)
    assert torch.equal(one, two) and one.shape == (1, 6, 2, 8)


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_would_change_the_result_is_refused(extra: dict[str, object]) -> None:
    plan = AttentionPlan((GroupSpan(0, 4, (2,)),), CPU)
    q = torch.randn(1, 2, 6, 8)
    with pytest.raises(ModelError, match="does not know"):
        shared_prefix_attention(nn.Module(), q, q, q, None, strop_plan=plan, **extra)  # type: ignore[arg-type]
    out, _ = shared_prefix_attention(
        nn.Module(), q, q, q, None, strop_plan=plan, position_ids=torch.zeros(1), s_aux=None, output_attentions=False
    )
    assert torch.isfinite(out).all()


def attend(kernel: str, inputs: tuple[Tensor, ...], scoring: SoftmaxRules) -> list[Tensor]:
    """Output and gradients of q, k, v, and of the sinks where there are some, of one kernel."""
    plan = AttentionPlan(LAYOUT, CPU, kernel)
    q, k, v, g = (x.detach().requires_grad_() for x in inputs)
    sinks = None if scoring.sinks is None else scoring.sinks.detach().requires_grad_()
    out = KERNELS[kernel](q, k, v, plan, replace(scoring, sinks=sinks))
    out.backward(g)
    return [out.detach(), *(x.grad for x in (q, k, v, sinks) if x is not None and x.grad is not None)]


def draw(heads: int, key_heads: int, dtype: torch.dtype, width: int = 8) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output, as the projections of a model lie in memory: token by token."""
    generator = torch.Generator().manual_seed(0)
    n = LAYOUT[-1].stop
    shapes = [(1, n, h, width) for h in (heads, key_heads, key_heads, heads)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for s in shapes)


@pytest.mark.share(80)
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 6, 100])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_every_kernel_is_the_oracle(
    rows: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    heads: int,
    key_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiled_attention, "WIDE_TILE_ROWS", rows)
    monkeypatch.setattr(tiled_attention, "KEPT_BYTES", {1: 60, 2: 0}.get(rows, 2**24))
    inputs = draw(heads, key_heads, torch.float64)
    scoring = SoftmaxRules(0.3, window, softcap, torch.linspace(-1, 2, heads, dtype=torch.float64) if sinks else None)
    want = attend("dense", inputs, scoring)
    for kernel in KERNELS:
        for ours, theirs in zip(attend(kernel, inputs, scoring), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kept", [0, 300, 2**24])
def test_tiles_round_no_worse_than_plain_products(
    dtype: torch.dtype, window: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 is the truth; the naive way is q k^T, a mask, a softmax, a product, in the dtype."""
    monkeypatch.setattr(tiled_attention, "KEPT_BYTES", kept)
    monkeypatch.setattr(tiled_attention, "SHARED_WASTE", 0 if kept == 300 else 2**11)
    exact = attend("dense", draw(6, 2, torch.float64, 32), SoftmaxRules(0.3, window))
    inputs = draw(6, 2, dtype, 32)
    q, k, v, g = (x.detach().requires_grad_() for x in inputs)
    scores = (q @ k.repeat_interleave(3, 1).transpose(2, 3) * 0.3).masked_fill(
        ~dense_mask(LAYOUT, CPU, window), float("-inf")
    )
    out = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    out.backward(g)
    naive = [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]
    for ours, theirs, truth in zip(attend("tiles", inputs, SoftmaxRules(0.3, window)), naive, exact, strict=True):
        error, allowed = (ours.double() - truth).norm(), (theirs.double() - truth).norm()
        assert ours.dtype == dtype and 0 < error <= 1.5 * allowed


def test_tiles_leave_out_what_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a tile end at its last query and, with a window, begin at the first that its first query sees."""
    monkeypatch.setattr(tiled_attention, "WIDE_TILE_ROWS", 128)
    layout = (GroupSpan(0, 300, (200, 150)),)
    full = tiled_attention.cut_tiles(layout, None, 1, torch.float32, CPU)
    assert [t.queries for t in full] == [(0, 125), (125, 250), (250, 375), (375, 500), (500, 575), (575, 650)]
    assert [t.keys for t in full[-3:]] == [((0, 500),), ((0, 300), (500, 575)), ((0, 300), (500, 650))]
    assert full[0].mask is full[3].mask  # one triangle
    near = tiled_attention.cut_tiles(layout, 50, 1, torch.float32, CPU)
    assert [t.keys for t in near[-3:]] == [((326, 500),), ((251, 300), (500, 575)), ((526, 650),)]


def test_short_sequences_of_a_group_share_a_tile() -> None:
    """As long as that wastes few scores, whatever stands beside the group; long ones have tiles of their own."""
    short, long = GroupSpan(0, 13, (6,) * 8), GroupSpan(61, 140, (20, 20, 20, 150, 6))
    tiles = tiled_attention.cut_tiles((short, long), None, 1, torch.float32, CPU)
    assert [t.queries for t in tiles] == [(0, 61), (61, 221), (221, 261), (261, 417)]
    assert [t.keys for t in tiles[:3]] == [((0, 61),), ((61, 221),), ((61, 201), (221, 261))]
    [alone] = tiled_attention.cut_tiles((short,), None, 1, torch.float32, CPU)
    assert alone.queries == tiles[0].queries and torch.equal(alone.mask, tiles[0].mask)


@pytest.mark.parametrize("repeats", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_has_few_scores(repeats: int, dtype: torch.dtype) -> None:
    layout = (GroupSpan(0, 3000, (200, 900)),)
    cut = tiled_attention.cut_tiles(layout, None, repeats, dtype, CPU)
    sizes = [repeats * (t.queries[1] - t.queries[0]) * sum(b - a for a, b in t.keys) for t in cut]
    assert max(sizes) <= tiled_attention.TILE_SCORES < 3 * max(sizes)
    assert [t.queries[0] for t in cut] == [0, *(t.queries[1] for t in cut[:-1])] and cut[-1].queries[1] == 4100
