"""Matrix products: every library and every layout in memory gives the same, as exactly as torch's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strop.policy.kernels import matmul

LAYOUTS = ("rows", "columns", "gaps", "other gaps")


def draw(rows: int, columns: int, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """A random matrix as it may lie in memory."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if layout == "columns":
        return x.t().contiguous().t()
    wide = torch.zeros(2 * rows, columns + 3, dtype=dtype)
    if layout == "gaps":
        wide[:rows, 1 : columns + 1] = x
        return wide[:rows, 1 : columns + 1]
    if layout == "other gaps":
        wide[::2, :columns] = x
        return wide[::2, :columns]
    return x


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.share(120)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("w_layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "outputs"), [(40, 7), (5, 90), (1, 3), (12, 1)])
@pytest.mark.parametrize("large", [0, 2**30])
def test_products_are_torchs(
    dtype: torch.dtype,
    x_layout: str,
    w_layout: str,
    rows: int,
    outputs: int,
    large: int,
    pretend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "LARGE", large)
    pretend(onednn=2.0, bf16=2.0)
    x, w = draw(rows, 33, dtype, x_layout, 0), draw(outputs, 33, dtype, w_layout, 1)
    bias, total = draw(1, outputs, dtype, "rows", 2)[0], draw(rows, outputs, dtype, x_layout, 3)
    truth = x.double() @ w.double().t()
    near = 4 * torch.finfo(dtype).eps
    buffer = torch.empty(rows + 2, outputs, dtype=dtype)
    assert error(matmul.linear(x, w), truth) <= near
    assert error(matmul.linear(x, w, buffer=buffer), truth) <= near
    assert error(matmul.linear(x, w, bias), truth + bias.double()) <= near
    gaps = draw(outputs, 3, dtype, "rows", 4)[:, 1]
    assert error(matmul.linear(x, w, gaps), truth + gaps.double()) <= near
    assert error(matmul.linear_add(total.clone(), x, w), truth + total.double()) <= near


@pytest.mark.parametrize("onednn", [0.5, 2.0])
def test_float32_does_not_round_what_it_multiplies(
    onednn: float, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worse than torch's own product in float32, beside float64."""
    monkeypatch.setattr(matmul, "LARGE", 0)
    pretend(onednn=onednn)
    x, w = draw(64, 300, torch.float32, "rows", 4), draw(50, 300, torch.float32, "rows", 5)
    truth = x.double() @ w.double().t()
    assert error(matmul.linear(x, w), truth) <= 2 * error(x @ w.t(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("onednn", [0.5, 2.0])
def test_what_is_faster_in_float32_is_rounded_once(
    dtype: torch.dtype, layout: str, onednn: float, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact but for the last rounding, as no sum in 16 bits would be."""
    monkeypatch.setattr(matmul, "LARGE", 0)
    pretend(bf16=0.3, fp16=0.3, onednn=onednn)
    x, w = draw(40, 500, dtype, layout, 0), draw(30, 500, dtype, layout, 1)
    bias, total = draw(1, 30, dtype, "rows", 2)[0], draw(40, 30, dtype, layout, 3)
    truth = x.double() @ w.double().t()
    buffer = torch.zeros(50, 30, dtype=dtype)
    found = matmul.linear(x, w, buffer=buffer)
    assert found.data_ptr() == buffer.data_ptr() and not buffer[40:].any()
    exact = {
        "product": (found, truth),
        "no buffer": (matmul.linear(x, w), truth),
        "bias": (matmul.linear(x, w, bias), truth + bias.double()),
        "total": (matmul.linear_add(total.clone(), x, w), truth + total.double()),
        "batch": (matmul.bmm(x[None], w.t()[None])[0], truth),
    }
    for name, (ours, theirs) in exact.items():
        assert ours.dtype == dtype, name
        unlike = ours != theirs.to(dtype)  # a sum in float32 may fall on the other side of a tie
        assert unlike.float().mean() <= 0.03, name
        assert error(ours, theirs) <= torch.finfo(dtype).eps / 2, name


def test_float32_and_float64_are_never_widened(pretend: Callable[..., None]) -> None:
    pretend(bf16=0.1, fp16=0.1)
    assert not matmul.widens(torch.float32) and not matmul.widens(torch.float64)
    assert matmul.widens(torch.bfloat16) and matmul.widens(torch.float16)
