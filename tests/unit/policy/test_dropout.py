"""What adapters do not see: drawn with the right probabilities, and the same forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from strop.policy.kernels import dropout
from strop.policy.kernels.dropout import FEW, draw_left_out, without, zero_
from strop.policy.kernels.fused import FusedLinear, FusedMlp, fuse
from strop.policy.kernels.weight_copies import WeightCopies

CPU = torch.device("cpu")
WIDTH, INNER = 24, 40


def as_mask(left_out: Tensor, shape: torch.Size) -> Tensor:
    return zero_(torch.ones(shape), left_out) == 0


@pytest.mark.share(1)
@pytest.mark.parametrize("p", [0.02, 0.1, FEW, 0.5, 0.9])
def test_every_element_is_left_out_with_probability_p_and_by_itself(p: float) -> None:
    torch.manual_seed(0)
    x, times = torch.ones(3, 4), 20_000 if p < 0.1 else 5_000  # so that some pairs are left out
    drawn = torch.stack([as_mask(draw_left_out(x, p), x.shape).flatten() for _ in range(times)]).double()
    for of, expected in ((drawn, p), (drawn[:, 1:] * drawn[:, :-1], p * p), (drawn[:, :1] * drawn[:, 2:], p * p)):
        spread = (expected * (1 - expected) / times) ** 0.5
        assert (of.mean(0) - expected).abs().max() < 5 * spread


def test_places_are_in_order_and_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    x, places = torch.ones(100, 1000), dropout.geometric_places
    torch.manual_seed(0)
    whole = draw_left_out(x, 0.05)
    monkeypatch.setattr(dropout, "geometric_places", lambda count, p: places(min(count, 7), p))  # the draws run out
    torch.manual_seed(0)
    for found in (whole, draw_left_out(x, 0.05)):
        assert found.dtype == torch.int64 and bool((found.diff() > 0).all())
        assert found[0] >= 0 and found[-1] < x.numel() and 4500 < len(found) < 5500
    assert found[-1] > 99_000


@pytest.mark.parametrize("p", [0.1, 0.7])
def test_zeros_stand_where_something_is_left_out(p: float) -> None:
    x = torch.rand(7, 5) + 1
    left_out = draw_left_out(x, p)
    assert torch.equal(without(x, left_out) == 0, as_mask(left_out, x.shape)) and bool((x > 0).all())
    by_columns = x.t().contiguous().t()
    assert torch.equal(without(by_columns, left_out), without(x, left_out))
    assert torch.equal(zero_(by_columns.clone(), left_out), without(x, left_out))
    assert without(x, None) is x


class Block(nn.Module):
    """Layers that share an input, an MLP, and one layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, n, bias=n > 8) for n in (WIDTH, 8, 8))
        self.mlp, self.out = Mlp(), nn.Linear(WIDTH + 16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        found: Tensor = self.out(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1))
        return found


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(INNER, WIDTH), ACT2FN["silu"]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Fixed(nn.Module):
    """Dropout that leaves out what another has left out."""

    def __init__(self, left_out: Tensor, p: float) -> None:
        super().__init__()
        self.left_out, self.p = left_out, p

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(as_mask(self.left_out, x.shape), 0) / (1 - self.p)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("adapted", [["q_proj", "v_proj", "down_proj"], "all-linear", ["k_proj", "gate_proj"]], ids=str)
def test_fused_layers_leave_out_the_same_on_the_way_back(
    p: float, adapted: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against peft's own layers with the same masks."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=p, target_modules=adapted, init_lora_weights=False)
    plain = get_peft_model(Block().double(), config).double()
    fused = copy.deepcopy(plain)
    fuse(fused, WeightCopies(), CPU)
    assert isinstance(vars(fused.base_model.model.mlp)["forward"], FusedMlp)
    drawn: dict[nn.Module, Tensor] = {}
    draw = FusedLinear.draw

    def noted(self: FusedLinear, x: Tensor) -> Tensor | None:
        found = draw(self, x)
        if found is not None:
            assert self.module not in drawn
            drawn[self.module] = found
        return found

    monkeypatch.setattr(FusedLinear, "draw", noted)
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    results = []
    for model in (fused, plain):
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        out.backward(torch.ones_like(out))
        gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
        results.append({"output": out.detach(), "input": inputs.grad, **gradients})
        twins = dict(plain.named_modules())
        for name, module in fused.named_modules():
            if module in drawn:
                twins[name].lora_dropout["default"] = Fixed(drawn[module], p)
    assert len(drawn) == {"all-linear": 7}.get(str(adapted), len(adapted))
    got, want = results
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
