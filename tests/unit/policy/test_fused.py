"""Fused layers give what the modules' own forwards give, outputs and gradients, and stand aside where they should."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from strop.policy.kernels.dropout import draw_left_out, zero_
from strop.policy.kernels.elementwise import compiled
from strop.policy.kernels.fused import FusedLinear, FusedMlp, FusedNorm, SharedInput, fuse
from strop.policy.kernels.weight_copies import WeightCopies
from strop.policy.policy import Policy
from strop.types import Group

MakePolicy = Callable[..., Policy]
CPU = torch.device("cpu")
WIDTH, INNER = 24, 40


class Norm(nn.Module):
    """The RMS norm of most architectures."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(WIDTH))
        self.variance_epsilon, self.shift = 1e-5, shift

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.shift) * normed.to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, activation: str = "silu", bias: bool = False, swapped: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias)
        self.act_fn, self.swapped = ACT2FN[activation], swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden: Tensor = self.act_fn(up) * gate if self.swapped else self.act_fn(gate) * up
        out: Tensor = self.down_proj(hidden)
        return out


class Layer(nn.Module):
    """A norm, an MLP and a linear layer between residuals."""

    def __init__(self, **mlp: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.out = Norm(), Mlp(**mlp), nn.Linear(WIDTH, WIDTH, mlp.get("bias", False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.out(x + self.mlp(self.norm(x)))
        return out


def adapt(layer: nn.Module, master: torch.dtype = torch.float64, **lora: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["gate_proj", "up_proj", "down_proj", "out"], **lora)
    adapted = get_peft_model(layer, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(master) + 0.2 * torch.randn(weight.shape).to(master)
    return adapted


def pair(dtype: torch.dtype = torch.float64, lora: dict[str, Any] | None = None, **mlp: Any) -> tuple[nn.Module, ...]:
    """The same layer twice: as it is, and fused."""
    torch.manual_seed(0)
    plain: nn.Module = Layer(**mlp).to(dtype)
    if lora is not None:
        plain = adapt(plain, torch.float64 if dtype == torch.float64 else torch.float32, **lora)
    fused = copy.deepcopy(plain)
    fuse(fused, WeightCopies(), CPU)
    return plain, fused


def run(module: nn.Module, dtype: torch.dtype = torch.float64, low: bool = False) -> dict[str, Tensor]:
    """Output and gradients by name; low: under autocast to bfloat16."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    module.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = module(x)
    out.backward(torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype))
    assert x.grad is not None
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad, **gradients}


KINDS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"activation": "gelu_pytorch_tanh"},
    {"lora": {}},
    {"lora": {"bias": "all"}, "bias": True},
    {"lora": {}, "activation": "gelu_pytorch_tanh", "bias": True},
]


DTYPES = [(torch.float32, 1.0), (torch.bfloat16, 2.0), (torch.bfloat16, 0.3)]
"""With the speed of bfloat16, which is multiplied in float32 where it is slow."""


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fused_is_plain(kind: dict[str, Any]) -> None:
    plain, fused = pair(**kind)
    kinds = {type(vars(m)["forward"]) for m in fused.modules() if "forward" in vars(m)}
    assert kinds == {FusedLinear, FusedMlp, FusedNorm}
    want, got = run(plain), run(fused)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "bf16"), DTYPES)
def test_fused_rounds_no_worse_than_plain(
    kind: dict[str, Any], dtype: torch.dtype, bf16: float, pretend: Callable[..., None]
) -> None:
    """float64 is the truth. A frozen base is stored in 16 bits, weights that train in float32."""
    pretend(bf16=bf16)
    low = dtype == torch.bfloat16
    stored = dtype if "lora" in kind else torch.float32
    layers = pair(stored, **kind)
    exact = copy.deepcopy(layers[0]).double()
    truth = run(exact)
    plain, fused = (run(layer, stored, low) for layer in layers)
    for name, value in truth.items():
        error, allowed = ((x[name].double() - value).norm() for x in (fused, plain))
        assert fused[name].dtype == plain[name].dtype
        assert error <= 1.5 * allowed + 1e-7 * value.norm(), name


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own, of its own
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_rounds_hardly_worse_than_plain(dtype: torch.dtype) -> None:
    plain, _ = pair(dtype, {})
    fused = copy.deepcopy(plain)
    fuse(fused, WeightCopies(), CPU, compiled(CPU))
    low = dtype == torch.bfloat16
    truth, theirs, ours = run(copy.deepcopy(plain).double()), run(plain, dtype, low), run(fused, dtype, low)
    for name, value in truth.items():
        error, allowed = ((x[name].double() - value).norm() for x in (ours, theirs))
        # roundings of its own, so that its errors are other ones
        assert error <= 2 * allowed + (1e-12 if dtype == torch.float64 else 1e-7) * value.norm(), name


def test_dropout_acts_on_the_adapters_input() -> None:
    """With the same random state twice the same, its mean that without dropout, its gradient that of its own mask."""
    plain, fused = pair(lora={"lora_dropout": 0.5})
    layer = fused.base_model.model.out
    x = torch.randn(4000, WIDTH, dtype=torch.float64)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(layer(x))
    assert torch.equal(*draws)
    base, whole = layer.base_layer(x), plain.eval().base_model.model.out(x)
    assert not torch.equal(draws[0], whole)
    torch.testing.assert_close((draws[0] - base).mean(0), (whole - base).mean(0), rtol=0.3, atol=0.1)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        out: Tensor = fused(x)
        return out

    assert torch.autograd.gradcheck(seeded, torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True))


class Fixed(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept.to(x.dtype)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize(("dtype", "bf16"), DTYPES)
def test_dropout_rounds_no_worse_than_plain(
    p: float, dtype: torch.dtype, bf16: float, pretend: Callable[..., None]
) -> None:
    pretend(bf16=bf16)
    plain, fused = pair(dtype, {"lora_dropout": p})
    draw = torch.Generator().manual_seed(1)
    x, slopes = (torch.randn(40, WIDTH, generator=draw).to(dtype) for _ in range(2))
    torch.manual_seed(2)
    kept = zero_(torch.ones(x.shape), draw_left_out(x, p)) / (1 - p)
    assert 0 < int((kept == 0).sum()) < kept.numel()
    own = plain.base_model.model.out
    own.lora_dropout["default"] = Fixed(kept)
    exact = copy.deepcopy(own).double()
    exact.lora_dropout["default"] = Fixed(kept.double())
    results = []
    for layer, wide in ((fused.base_model.model.out, False), (own, False), (exact, True)):
        given = (x.double() if wide else x.clone()).requires_grad_()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and not wide):
            out = layer(given)
        out.backward(slopes.to(out.dtype))
        weights = {n: w.grad for n, w in layer.named_parameters() if w.grad is not None}
        results.append({"output": out.detach(), "input": given.grad, **weights})
    for name, truth in results[2].items():
        error, allowed = ((found[name].double() - truth).norm() for found in results[:2])
        assert error <= 1.5 * allowed + 1e-7 * truth.norm(), name


def test_stands_aside_where_adapters_are_off_or_merged() -> None:
    plain, fused = pair(lora={})
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    on = fused(x)
    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), plain(x))
        assert not torch.equal(fused(x), on)
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), on)
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(x), on)


def test_what_it_does_not_know_keeps_its_own_forward() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shifted, self.swapped, self.relu = Norm(1.0), Mlp(swapped=True), Mlp("relu")
            self.hooked = nn.Linear(WIDTH, WIDTH)
            self.hooked.register_forward_hook(lambda module, args, out: out + 1)

    odd = Odd()
    fuse(odd, WeightCopies(), CPU)
    assert not any("forward" in vars(m) for m in (odd.shifted, odd.swapped, odd.relu, odd.hooked))

    class Clamped(Mlp):
        """As random tokens are no larger than the limit, only larger ones show it."""

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x).clamp(-10, 10))
            return out

    for dtype in (torch.float32, torch.bfloat16):
        clamped, usual = Clamped().to(dtype), Mlp().to(dtype)
        fuse(nn.Sequential(clamped, usual), WeightCopies(), CPU)
        assert "forward" not in vars(clamped) and "forward" in vars(usual)
    dora = adapt(Layer(), torch.float32, use_dora=True)
    fuse(dora, WeightCopies(), CPU)
    assert not any("forward" in vars(m) for n, m in dora.named_modules() if n.endswith(("_proj", "out", "mlp")))


def test_what_cannot_be_tried_keeps_its_own_forward() -> None:
    """A gated norm looks like a norm; what it raises without its gate says no more than that it is none."""

    class Gated(Norm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * torch.sigmoid(gate)

    class Refuses(Norm):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("layer_idx")

    class Several(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x), x  # type: ignore[return-value]

    class Fits(Mlp):
        def forward(self, x: Tensor, size: int) -> Tensor:  # type: ignore[override]
            return super().forward(x) * size

    kinds = [Gated(), Refuses(), Several(), Fits()]
    assert all(module.training for module in kinds)
    fuse(nn.Sequential(*kinds), WeightCopies(), CPU)
    assert not any("forward" in vars(module) for module in kinds)
    assert all(module.training for module in kinds)


def test_more_than_one_argument_means_the_modules_own_forward() -> None:
    """Alone it is a norm, with a gate it is another."""

    class MayGate(Norm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x if gate is None else x * torch.sigmoid(gate))

    module = MayGate()
    plain = copy.deepcopy(module)
    fuse(nn.Sequential(module), WeightCopies(), CPU)
    assert isinstance(vars(module)["forward"], FusedNorm)
    x, gate = torch.randn(2, 3, WIDTH).unbind()
    torch.testing.assert_close(module(x), plain(x))
    for got in (module(x, gate), module(x, gate=gate)):
        assert torch.equal(got, plain(x, gate))
    assert torch.equal(module(x=x), plain(x))


@pytest.mark.parametrize("adapted", [["q_proj", "v_proj"], ["k_proj"], []])
def test_layers_of_one_input_are_computed_together(adapted: list[str]) -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, n, bias=n > 8) for n in (16, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.v_proj(x), self.k_proj(x), self.k_proj(x + 1)], -1)

    torch.manual_seed(0)
    plain: nn.Module = Projections().double()
    if adapted:
        plain = get_peft_model(plain, LoraConfig(r=4, target_modules=adapted, init_lora_weights=False)).double()
    fused = copy.deepcopy(plain)
    fuse(fused, WeightCopies(), CPU)
    want, got = run(plain), run(fused)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_computed_together_is_not_kept_and_not_mistaken() -> None:
    linears = [FusedLinear(nn.Linear(WIDTH, 4), WeightCopies()) for _ in range(3)]
    shared = SharedInput(tuple(linears))
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        early = shared.take(linears[0], x)
    assert not early.requires_grad
    late = [shared.take(linear, x) for linear in linears]
    assert all(y.requires_grad for y in late) and shared._input is None and not shared._outputs
    shared.take(linears[0], x)
    x += 1
    torch.testing.assert_close(shared.take(linears[1], x), linears[1].module(x))


def test_a_frozen_weight_and_a_frozen_input_get_no_gradient() -> None:
    _, fused = pair(lora={})
    out = fused(torch.randn(3, WIDTH, dtype=torch.float64))
    out.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in fused.parameters())
    linear = fused.base_model.model.out
    node = linear(torch.randn(3, WIDTH, dtype=torch.float64)).grad_fn.next_functions[0][0]
    assert [f[0] is not None for f in node.next_functions] == [False, False, True, True]  # x, w, a, b


def test_a_copy_is_a_model_of_its_own() -> None:
    _, fused = pair(lora={})
    twin = copy.deepcopy(fused)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    before = fused(x)
    with torch.no_grad():
        for weight in twin.parameters():
            weight += 0.1
    assert torch.equal(fused(x), before) and not torch.equal(twin(x), before)
    twin(x).sum().backward()
    assert all(p.grad is None for p in fused.parameters())


def test_copies_are_made_once_while_weights_stand_still() -> None:
    weight_copies, weight = WeightCopies(), nn.Parameter(torch.randn(3, 3))
    with weight_copies.weights_fixed():
        first = weight_copies(weight, torch.bfloat16)
        with weight_copies.weights_fixed():
            assert weight_copies(weight, torch.bfloat16) is first
        assert weight_copies(weight, torch.bfloat16) is first and not first.requires_grad
        assert weight_copies(weight, torch.float16).dtype == torch.float16
    with torch.no_grad():
        weight += 1
    with pytest.raises(ZeroDivisionError), weight_copies.weights_fixed():
        again = weight_copies(weight, torch.bfloat16)
        assert torch.equal(again, weight.bfloat16())
        assert again.data_ptr() == first.data_ptr()  # memory that the process has
        raise ZeroDivisionError
    assert weight_copies(weight, torch.bfloat16) is not again
    assert weight_copies(weight, torch.float32).data_ptr() == weight.data_ptr()


@pytest.mark.share(2)
@pytest.mark.parametrize("lora", [None, {"lora_dropout": 0.0}, {"use_dora": True, "lora_dropout": 0.0}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policy_trains_as_without(
    lora: dict[str, Any] | None,
    checkpointing: bool,
    build: MakePolicy,
    groups: list[Group],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for fusing in (True, False):
        if not fusing:
            monkeypatch.setattr("strop.policy.build.fuse", lambda *args: None)
        policy = build(lora=lora, training={"gradient_checkpointing": checkpointing})
        with policy.weights_fixed():
            for batch in (groups[:1], groups[1:]):
                policy(policy.collate(batch)).logps.sum().backward()
        results.append({n: p.grad for n, p in policy.trainable().items()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_no_tokens_are_no_error() -> None:
    """As a mixture of experts may ask of an expert."""
    _, fused = pair(lora={})
    assert fused(torch.empty(0, WIDTH, dtype=torch.float64)).shape == (0, WIDTH)
