"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from strop.policy.gradient_norm import ROW, clip, gradient_norm

SIZES = ((1,), (3, 5), (ROW,), (ROW + 1,), (2 * ROW - 1,), (7, ROW), (2048, 2048))


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_norm_in_float32_is_that_in_float64(shape: tuple[int, ...]) -> None:
    """However wide a weight is: torch's own is off by 1e-4 for 4 million numbers."""
    torch.manual_seed(0)
    gradient = 1e-3 * torch.randn(shape)
    found = gradient_norm([gradient, gradient.T if gradient.dim() == 2 else gradient])
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(math.sqrt(2) * float(gradient.double().norm()), rel=5e-7)


def test_no_gradient_has_the_norm_0_and_what_is_not_finite_is_seen() -> None:
    assert float(gradient_norm([])) == 0.0
    assert math.isnan(float(gradient_norm([torch.ones(3), torch.tensor([math.nan])])))
    assert math.isinf(float(gradient_norm([torch.tensor([1.0, math.inf])])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipped_gradients_have_the_norm_that_is_allowed(limit: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((400, 500), (300,), (2,))]
    for weight in weights[:2]:
        weight.grad = torch.randn_like(weight)
    before = [torch.zeros(()) if w.grad is None else w.grad.clone() for w in weights]
    norm = gradient_norm(w.grad for w in weights if w.grad is not None)
    clip(weights, limit, norm)
    after = gradient_norm(w.grad for w in weights if w.grad is not None)
    assert float(after) == pytest.approx(min(limit, float(norm)), rel=3e-6)
    assert weights[2].grad is None
    if limit > float(norm):
        assert all(torch.equal(w.grad, b) for w, b in zip(weights[:2], before, strict=False) if w.grad is not None)
