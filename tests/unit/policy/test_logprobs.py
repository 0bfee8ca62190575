"""The tiled head: the naive head's numbers and gradients, without its memory."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peak import Peak
from strop.policy.kernels import head_sizes, logprobs
from strop.policy.kernels.logprobs import naive_token_logps, token_logps
from strop.policy.model.logit_transform import LogitTransform

M, D, V = 13, 6, 31
TRANSFORMS = [LogitTransform(), LogitTransform(0.25), LogitTransform(softcap=2.0), LogitTransform(3.0, 1.5)]


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def native(request: pytest.FixtureRequest, pretend: Any) -> bool:
    """Whether the processor is faster in 16 bits: both, whatever this one is."""
    pretend(bf16=2.0 if request.param else 0.3, fp16=2.0 if request.param else 0.3)
    return bool(request.param)


def make_head(dtype: torch.dtype = torch.float64, bias: bool = True, spread: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((M, D), (V, D), (V,)))
    targets = torch.randint(V, (M,), generator=generator)
    return (spread * hidden).to(dtype), weight.to(dtype), b.to(dtype) if bias else None, targets  # type: ignore[return-value]


@pytest.mark.share(24)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (13, 31), (100, 100)])
@pytest.mark.parametrize("trained", ["hidden", "weight bias", "hidden weight bias", "hidden bias"])
def test_is_the_naive_head(transform: LogitTransform, tile: tuple[int, int], trained: str) -> None:
    hidden, weight, bias, targets = make_head()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name in trained.split():
        leaves[name].requires_grad_()
    inputs = [leaves[name] for name in trained.split()]
    coefficients = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = naive_token_logps(hidden, weight, bias, targets, transform=transform)
    got = token_logps(hidden, weight, bias, targets, transform=transform, tile=tile)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got @ coefficients, inputs),
        torch.autograd.grad(want @ coefficients, inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_collisions_are_the_log_of_the_sum_of_squares(transform: LogitTransform, trained: bool) -> None:
    hidden, weight, bias, targets = make_head()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)][: 1 + trained]
    both = token_logps(hidden, weight, bias, targets, transform=transform, tile=(5, 15), collisions=True)
    alone = token_logps(hidden, weight, bias, targets, transform=transform, tile=(5, 15))
    p = torch.softmax(transform(torch.nn.functional.linear(hidden, weight, bias)), dim=-1)
    torch.testing.assert_close(both[1], p.square().sum(-1).log(), rtol=1e-12, atol=1e-12)
    assert torch.equal(both[0], alone)
    # no gradient goes through the second row
    for ours, theirs in zip(
        torch.autograd.grad(both.sum(), leaves), torch.autograd.grad(alone.sum(), leaves), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.share(2)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_by_finite_differences(transform: LogitTransform, frozen: bool) -> None:
    hidden, weight, bias, targets = make_head()
    inputs = [x.requires_grad_() for x in ([hidden] if frozen else [hidden, weight, bias])]

    def function(*changed: Tensor) -> Tensor:
        head = (*changed, weight, bias)[:3] if frozen else changed
        return token_logps(*head, targets, transform=transform, tile=(4, 14))  # type: ignore[misc]

    assert torch.autograd.gradcheck(function, inputs)


def test_without_bias_and_without_gradients() -> None:
    hidden, weight, _, targets = make_head(bias=False)
    got = token_logps(hidden.requires_grad_(), weight, None, targets)
    torch.testing.assert_close(got, naive_token_logps(hidden, weight, None, targets))
    with torch.no_grad():
        assert not token_logps(hidden, weight, None, targets).requires_grad


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("room", [0, 1, 100])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_for_logits_changes_rounding_alone(
    room: int, transform: LogitTransform, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, some or all of the logits kept: the same log-probs, and gradients as near to each other as products in the
    dtype are."""
    results = []
    for factor in (head_sizes.KEPT_GRADIENTS, room):
        monkeypatch.setattr(head_sizes, "KEPT_GRADIENTS", factor)
        hidden, weight, bias, targets = make_head(torch.float32)
        leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        out = token_logps(*leaves, targets, transform=transform, compute=dtype, tile=(4, 14))
        coefficients = torch.linspace(-1, 2, M)
        results.append([out, *torch.autograd.grad(out @ coefficients, leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for some, others in zip(*results, strict=True):
        assert (some - others).norm() <= 2 * torch.finfo(dtype).eps * some.norm()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_rounds_no_worse_than_the_naive_head(compute: torch.dtype, trained: bool) -> None:
    """float64 is the truth; the tiled head may be as far from it as the naive one in the same dtype."""
    results = []
    coefficients = torch.randn(M, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, compute, torch.float64):
        given = [t.to(torch.float32) for t in make_head(spread=3.0)[:3]]
        hidden, weight, bias, targets = (*given, make_head()[3])
        leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]
        if not results:
            logps = token_logps(hidden, weight, bias, targets, compute=compute, tile=(4, 14))
            assert logps.dtype == torch.float32
        else:
            logps = naive_token_logps(hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets)
        (logps @ coefficients.to(logps.dtype)).backward()
        results.append([logps.detach().double(), *(x.grad.double() for x in leaves if x.requires_grad)])
    for ours, naive, truth in zip(*results, strict=True):
        assert (ours - truth).norm() <= 1.2 * (naive - truth).norm() + 3e-7 * truth.norm()


def test_a_frozen_heads_backward_pass_makes_no_product() -> None:
    """Its gradient lies ready from the forward pass."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    made: list[str] = []
    hidden, weight, bias, targets = make_head()
    logps = token_logps(hidden.requires_grad_(), weight, bias, targets, tile=(5, 15))
    with Products():
        logps.sum().backward()
    assert made and not any(name in operation for operation in made for name in ("mm", "linear", "matmul"))


def test_large_logits_stay_finite() -> None:
    hidden, weight, bias, targets = make_head(torch.float32, spread=1e4)
    logps = token_logps(hidden.requires_grad_(), weight, bias, targets)
    logps.sum().backward()
    assert torch.isfinite(logps).all() and torch.isfinite(hidden.grad).all()
    assert (logps <= 0).all()


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix product makes more than one tile, whatever trains; where the head does, one without room for its logits
    is made twice."""
    shapes = []
    logits = logprobs._Head.logits

    def watched(self: Any, h: Tensor, columns: slice, room: Tensor | None = None) -> Tensor:
        z = logits(self, h, columns, room)
        shapes.append(z.shape)
        return z

    monkeypatch.setattr(logprobs._Head, "logits", watched)
    monkeypatch.setattr(head_sizes, "KEPT_GRADIENTS", 1)
    hidden, weight, bias, targets = make_head()
    for trains in (False, True):
        token_logps(
            hidden.requires_grad_(), weight.requires_grad_(trains), bias, targets, tile=(4, 16)
        ).sum().backward()
    all_tiles = [(rows, columns) for rows in (4, 4, 4, 1) for columns in (16, 15)]
    assert head_sizes.kept_logits(M, V, D, torch.float64) == 6 * V  # room for two tiles, of 4 x 31
    assert shapes == all_tiles + all_tiles + all_tiles[2:]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("elements", [1, 2 * V, 5 * V])
def test_slabs_change_nothing(transform: LogitTransform, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for slab in (head_sizes.SLAB_ELEMENTS, elements):
        monkeypatch.setattr(head_sizes, "SLAB_ELEMENTS", slab)
        hidden, weight, bias, targets = make_head(torch.float32)
        leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        out = token_logps(*leaves, targets, transform=transform, tile=(7, 17), collisions=True)
        results.append([out, *torch.autograd.grad(out[0].sum(), leaves)])
    for whole, slabs in zip(*results, strict=True):
        torch.testing.assert_close(whole, slabs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_widens_does_it_once(native: bool, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of all tiles, and of the backward pass, have the dtype that the processor computes in."""
    seen = []
    linear = logprobs.linear

    def watched(x: Tensor, w: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((x.dtype, w.dtype))
        return linear(x, w, *args, **kwargs)

    monkeypatch.setattr(logprobs, "linear", watched)
    hidden, weight, bias, targets = make_head(torch.float32)
    weight = weight.requires_grad_() if trained else weight.bfloat16()
    logps = token_logps(hidden.requires_grad_(), weight, bias, targets, compute=torch.bfloat16, tile=(4, 14))
    logps.sum().backward()
    dtype = torch.bfloat16 if native else torch.float32
    assert set(seen) == {(dtype, dtype)} and len(seen) >= 6
    if not native:
        exact = naive_token_logps(hidden, weight.float(), bias, targets)
        torch.testing.assert_close(logps, exact, rtol=1e-6, atol=1e-6)


def test_a_sure_token_has_a_log_prob() -> None:
    """It is not rounded as its logit is: at 40, float32 has steps of 4e-6."""
    weight = torch.tensor([[40.0], [26.0]])
    logp = token_logps(torch.ones(1, 1), weight, None, torch.tensor([0]))
    assert float(logp) == pytest.approx(-math.exp(-14), rel=0.1)


@pytest.mark.usefixtures("native")
def test_a_sure_token_keeps_its_small_gradient() -> None:
    """1 - p near 0 is taken before it is rounded to 16 bits, in which p is 1."""
    weight = torch.tensor([[9.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    hidden, target = torch.tensor([[1.0, 1.0]], requires_grad=True), torch.tensor([0])
    (gradient,) = torch.autograd.grad(token_logps(hidden, weight, None, target, compute=torch.bfloat16), hidden)
    assert float(gradient[0, 0]) == pytest.approx(9 / (1 + math.exp(9)), rel=0.01)


@pytest.mark.parametrize("trained", [True, False])
def test_can_be_checkpointed(trained: bool) -> None:
    hidden, weight, bias, targets = make_head()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)][: 1 + trained]
    want = torch.autograd.grad(token_logps(hidden, weight, bias, targets).sum(), leaves)
    again = checkpoint(token_logps, hidden, weight, bias, targets, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again.sum(), leaves), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "targets"), [(5, 4), (4, 5), (0, 0)])
def test_shapes_that_do_not_fit_are_refused(rows: int, targets: int) -> None:
    with pytest.raises(ValueError, match=rf"hidden \[{rows}, 6\], W \[31, 6\] and targets \[{targets}\]"):
        token_logps(torch.zeros(rows, D), torch.zeros(V, D), None, torch.zeros(targets, dtype=torch.long))


def test_the_weights_gradient_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = make_head()
    weight.requires_grad_()
    monkeypatch.setattr(head_sizes, "KEPT_GRADIENTS", 0)
    (whole,) = torch.autograd.grad(token_logps(hidden, weight, bias, targets, tile=(5, V)).sum(), weight)
    monkeypatch.setattr(head_sizes, "TILE_ELEMENTS", 16 * D)
    (parts,) = torch.autograd.grad(token_logps(hidden, weight, bias, targets, tile=(5, V)).sum(), weight)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(softcap=30.0)], ids=str)
@pytest.mark.parametrize("collisions", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_its_memory_is_known(
    transform: LogitTransform, collisions: bool, trained: bool, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a large vocabulary, with all columns in a tile, as on a GPU."""
    rows, vocabulary, width = 700, 151_936, 512
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta tensors have none
    hidden = torch.empty(rows, width, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, width, dtype=compute, device="meta", requires_grad=trained)
    targets = torch.empty(rows, dtype=torch.long, device="meta")
    with Peak(hidden, weight, targets) as peak:
        out = token_logps(hidden, weight, None, targets, compute=compute, transform=transform, collisions=collisions)
        out.sum().backward()
    known = head_sizes.head_bytes(
        rows, vocabulary, width, "meta", compute, transform=transform, collisions=collisions, trains=trained
    )
    if trained:  # W's gradient, which is float32 until it is whole
        known += (4 + compute.itemsize * (compute.itemsize < 4)) * vocabulary * width
    assert 0.75 * known < peak.most <= known
