"""The entropy of a head's distribution, tile by tile, is that of whole logits: its value, its gradients, its memory."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

from peak import Peak
from strop.policy.kernels import head_sizes
from strop.policy.kernels.entropy import naive_token_entropies, token_entropies
from strop.policy.model.logit_transform import LogitTransform

TRANSFORMS = (LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 3.0))
M, V, D = 11, 53, 7


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((M, D), (V, D), (V,)))
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_sizes.SMALL_TILES, "cpu", (4, 16))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias", "weight"])
def test_values_and_gradients_are_those_of_whole_logits(trained: str, transform: LogitTransform) -> None:
    leaves = dict(zip(("hidden", "weight", "bias"), head(), strict=True))
    inputs = [leaves[name].requires_grad_() for name in trained.split()]
    coefficients = torch.linspace(-1, 1, M, dtype=torch.float64)
    ours, theirs = (of(*leaves.values(), transform=transform) for of in (token_entropies, naive_token_entropies))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, naive in zip(
        torch.autograd.grad(ours @ coefficients, inputs),
        torch.autograd.grad(theirs @ coefficients, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, naive, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_a_token_that_cannot_come_counts_nothing() -> None:
    hidden, weight, bias = head()
    bias[::3] = -torch.inf
    kept = [i for i in range(V) if i % 3]
    ours = token_entropies(hidden.requires_grad_(), weight, bias)
    theirs = naive_token_entropies(hidden, weight[kept], bias[kept])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mine, naive = (torch.autograd.grad(x.sum(), hidden)[0] for x in (ours, theirs))
    torch.testing.assert_close(mine, naive, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [0.0, 8.0], ids=["even", "sure"])
def test_float32_is_near_float64(scale: float) -> None:
    hidden, weight, _ = head()
    exact = token_entropies(scale * hidden, weight, None)
    found = token_entropies((scale * hidden).float(), weight.float(), None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)
    if not scale:
        assert found.tolist() == pytest.approx([math.log(V)] * M)


@pytest.mark.parametrize(("trained", "compute"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_its_memory_is_known(trained: bool, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a large vocabulary: what it takes is in the estimate of the head."""
    rows, vocabulary, width = 700, 151_936, 512
    monkeypatch.setitem(head_sizes.SMALL_TILES, "cpu", (350, 2**15))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta tensors have none
    hidden = torch.empty(rows, width, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, width, dtype=compute, device="meta", requires_grad=trained)
    with Peak(hidden, weight) as peak:
        token_entropies(hidden, weight, None, compute=compute).sum().backward()
    with_it, without = (
        head_sizes.head_bytes(
            rows, vocabulary, width, "meta", compute,
            transform=LogitTransform(), collisions=False, trains=trained, entropies=entropies,
        )
        for entropies in (True, False)
    )  # fmt: skip
    known = with_it - without + trained * (compute.itemsize < 4) * compute.itemsize * vocabulary * width
    assert 0.5 * known < peak.most <= known
    assert trained or peak.most < rows * vocabulary * 4, "never [M, V]"
