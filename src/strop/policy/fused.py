"""Layers of a model evaluated with fewer passes and less kept for the backward pass. Floor 2.

Shapes: T tokens, I inputs, O outputs, r rank.

`fuse` gives the modules it knows another forward; their weights, names and saved form stay what they are. Known are
linear layers (torch's own, with peft's plain LoRA or without), gated MLPs of them, and RMS norms. What it does not
know, or what is set to something else at the moment of a call (adapters off, merged, dropout in an MLP), goes the
module's own way.

    linear   y = x W^T + b + s (x A^T) B^T: the adapter is added into the product; x and x A^T are kept. A frozen weight
             gets no gradient, and an input that needs none gets none.
    MLP      y = down(act(gate(x)) * up(x)): x, gate(x) and up(x) are kept, their product is computed again.
    norm     y = w x / rms(x): x is kept.

Products run in the dtype of autocast, in the weight's own without; what a layer rounds it rounds where the module's
own forward does. MLPs and norms are recognised by their parts, so each is compared with its own forward first.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strop.policy.casts import Casts

logger = logging.getLogger("strop")


# --- products, without autograd ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weights:
    """What one linear layer multiplies with, in the compute dtype: w [O, I], bias [O], a [r, I], b [O, r]."""

    w: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    def forward(self, x: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """y [T, O] and s x A^T [T, r] of x [T, I]. dropped: x as the adapter sees it."""
        y = x @ self.w.t() if self.bias is None else torch.addmm(self.bias, x, self.w.t())
        if self.a is None or self.b is None:
            return y, None
        low = _times(dropped @ self.a.t(), self.scale)
        y.addmm_(low, self.b.t())
        return y, low

    def low_gradient(self, grad: Tensor) -> Tensor | None:
        """[T, r] s grad B: the gradient of x A^T."""
        return None if self.b is None else _times(grad @ self.b, self.scale)

    def input_gradient(self, grad: Tensor, d_low: Tensor | None, into: Tensor | None = None) -> Tensor:
        """[T, I], with the adapter's part if `d_low` is given; added to `into` in place, where that is given."""
        d_x = grad @ self.w if into is None else into.addmm_(grad, self.w)
        if self.a is not None and d_low is not None:
            d_x.addmm_(d_low, self.a)
        return d_x

    @staticmethod
    def own_gradients(
        trains: Sequence[bool], grad: Tensor, x: Tensor | None, dropped: Tensor | None, lows: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Of w, bias, a and b, as far as they train. lows: s x A^T and its gradient."""
        low, d_low = lows
        return (
            grad.t() @ x if trains[0] and x is not None else None,
            grad.sum(0) if trains[1] else None,
            d_low.t() @ dropped if trains[2] and d_low is not None and dropped is not None else None,
            grad.t() @ low if trains[3] and low is not None else None,
        )


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.mul_(scale)


# --- linear -----------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """Of x [T, I] and x as the adapter sees it (the same tensor without dropout); w, bias, a, b take the gradients,
    `weights` are multiplied with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, *rest: Any) -> Tensor:
        *_, weights = rest
        seen = x if dropped is None else dropped
        y: Tensor
        y, low = weights.forward(x, seen)
        trains = ctx.needs_input_grad[2:6]
        ctx.weights, ctx.apart = weights, dropped is not None
        ctx.save_for_backward(x if trains[0] else None, seen if trains[2] else None, low if trains[3] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, low = ctx.saved_tensors
        weights: Weights = ctx.weights
        wants_x, wants_dropped, *trains = ctx.needs_input_grad[:6]
        d_low = weights.low_gradient(grad)
        d_x = weights.input_gradient(grad, None if ctx.apart else d_low) if wants_x else None
        d_dropped = d_low @ weights.a if wants_dropped and d_low is not None and weights.a is not None else None
        return d_x, d_dropped, *weights.own_gradients(trains, grad, x, dropped, (low, d_low)), None


class FusedLinear:
    """The forward of a linear layer, plain or with a plain LoRA adapter."""

    def __init__(self, module: nn.Linear | LoraLinear, casts: Casts) -> None:
        self.module, self.casts = module, casts

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_plain:
            out: Tensor = type(self.module).forward(self.module, x)
            return out
        parameters, weights = self.parameters, self.weights(x.device)
        flat = x.reshape(-1, x.shape[-1])
        seen = self._drop(flat)
        flat, seen = flat.to(weights.w.dtype), None if seen is None else seen.to(weights.w.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Linear.apply(flat, seen, *parameters, weights)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

    @property
    def base(self) -> nn.Linear:
        """The layer under the adapter."""
        layer: nn.Linear = self.module.base_layer if isinstance(self.module, LoraLinear) else self.module
        return layer

    @property
    def is_plain(self) -> bool:
        """Whether the adapter is as it was when it was fused, on and not merged."""
        module = self.module
        if not isinstance(module, LoraLinear):
            return True
        return not module.disable_adapters and not module.merged and module.active_adapters == list(module.lora_A)

    @property
    def dropout(self) -> float:
        """Probability on the adapter's input."""
        if not isinstance(self.module, LoraLinear):
            return 0.0
        layer = next(iter(self.module.lora_dropout.values()))
        return float(layer.p) if isinstance(layer, nn.Dropout) and layer.training else 0.0

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """w, bias, a and b as they train."""
        if not isinstance(self.module, LoraLinear):
            return self.base.weight, self.base.bias, None, None
        ((name, a),) = self.module.lora_A.items()
        return self.base.weight, self.base.bias, a.weight, self.module.lora_B[name].weight

    def weights(self, device: torch.device) -> Weights:
        """The same in the compute dtype."""
        dtype = compute_dtype(device) or self.base.weight.dtype
        parameters = self.parameters
        if parameters[3] is not None and not torch.is_grad_enabled() and self.casts.is_zero(parameters[3]):
            parameters = (*parameters[:2], None, None)  # as before the first step: the adapter adds nothing
        w, bias, a, b = (None if p is None else self.casts(p, dtype) for p in parameters)
        assert w is not None
        scale = next(iter(self.module.scaling.values())) if isinstance(self.module, LoraLinear) else 1.0
        return Weights(w, bias, a, b, scale)

    def _drop(self, x: Tensor) -> Tensor | None:
        return F.dropout(x, self.dropout) if self.dropout else None


def compute_dtype(device: torch.device) -> torch.dtype | None:
    """That of autocast, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# --- gated MLP --------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "SiLUActivation": (F.silu, torch.ops.aten.silu_backward),
    "SiLU": (F.silu, torch.ops.aten.silu_backward),
    "GELUTanh": (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}
"""Class of the activation -> (x -> act(x)), ((gradient, x) -> gradient of x)."""


class _GatedMlp(torch.autograd.Function):
    """parameters: w, bias, a, b of gate, up and down, which take the gradients; `layers` are multiplied with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *_, layers, activation = rest
        gate, up, down = layers
        g, g_low = gate.forward(x, x)
        u, u_low = up.forward(x, x)
        h = activation[0](g).mul_(u)
        y: Tensor
        y, h_low = down.forward(h, h)
        ctx.layers, ctx.activation = layers, activation
        ctx.save_for_backward(x, g, u, g_low, u_low, h_low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, g_low, u_low, h_low = ctx.saved_tensors
        gate, up, down = ctx.layers
        function, slope = ctx.activation
        wants_x, *trains = ctx.needs_input_grad[:13]
        acted = function(g)
        low = down.low_gradient(grad)
        d_h = down.input_gradient(grad, low)
        h = acted * u
        d_down = down.own_gradients(trains[8:12], grad, h, h, (h_low, low))
        d_u = acted.mul_(d_h)
        d_g = slope(d_h.mul_(u), g)
        d_g_low, d_u_low = gate.low_gradient(d_g), up.low_gradient(d_u)
        d_x = up.input_gradient(d_u, d_u_low, into=gate.input_gradient(d_g, d_g_low)) if wants_x else None
        d_gate = gate.own_gradients(trains[0:4], d_g, x, x, (g_low, d_g_low))
        d_up = up.own_gradients(trains[4:8], d_u, x, x, (u_low, d_u_low))
        return d_x, *d_gate, *d_up, *d_down, None, None


class FusedMlp:
    """The forward of a gated MLP whose three layers are fused linear layers."""

    def __init__(self, module: nn.Module, layers: tuple[FusedLinear, ...]) -> None:
        self.module, self.layers = module, layers
        self.activation = ACTIVATIONS[type(module.act_fn).__name__]

    def __call__(self, x: Tensor) -> Tensor:
        if not all(layer.is_plain and not layer.dropout for layer in self.layers):
            out: Tensor = type(self.module).forward(self.module, x)
            return out
        parameters = [p for layer in self.layers for p in layer.parameters]
        weights = tuple(layer.weights(x.device) for layer in self.layers)
        flat = x.reshape(-1, x.shape[-1]).to(weights[0].w.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _GatedMlp.apply(flat, *parameters, weights, self.activation)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)


# --- RMS norm ---------------------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        exact = _exact(x)
        return exact.mul(_reciprocal(exact, eps)).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # with n = x / rms(x), d = w grad:  d x = (d - n mean(d n)) / rms(x)
        x, weight = ctx.saved_tensors
        exact, grad = _exact(x), _exact(grad)
        reciprocal = _reciprocal(exact, ctx.eps)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * exact).mul_(reciprocal).flatten(0, -2).sum(0).to(weight.dtype)
        d = grad * weight
        along = torch.linalg.vecdot(d, exact).unsqueeze(-1).mul_(reciprocal**3 / x.shape[-1])
        return d.mul_(reciprocal).addcmul_(exact, along, value=-1).to(x.dtype), d_weight, None


def _exact(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reciprocal(exact: Tensor, eps: float) -> Tensor:
    """[..., 1] 1 / rms(x)."""
    squares: Tensor = torch.linalg.vecdot(exact, exact).unsqueeze(-1)
    return squares.div_(exact.shape[-1]).add_(eps).rsqrt_()


class FusedNorm:
    """The forward of an RMS norm."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _RmsNorm.apply(x, self.module.weight, self.module.variance_epsilon)  # type: ignore[no-untyped-call]
        return y


# --- installing -------------------------------------------------------------------------------------------------------


def fuse(model: nn.Module, casts: Casts, device: torch.device) -> Counter[str]:
    """Fuse what is known in `model`, which is on its device; how many of each kind."""
    done: Counter[str] = Counter()
    linears: dict[nn.Module, FusedLinear] = {}
    inside = {m.base_layer for m in model.modules() if isinstance(m, LoraLinear)}
    for module in model.modules():
        if module not in inside and isinstance(module, nn.Linear | LoraLinear) and _is_plain_linear(module):
            linears[module] = FusedLinear(module, casts)
            _replace_forward(module, linears[module])
            done["linear layers"] += 1
    for module in model.modules():
        for kind, fused in _candidates(module, linears):
            if _agrees(module, fused, device):
                _replace_forward(module, fused)
                done[kind] += 1
    logger.debug("fused: %s", ", ".join(f"{n} {kind}" for kind, n in done.items()) or "nothing")
    return done


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    vars(module)["forward"] = forward  # an object, not a bound method, so that a deep copy of a model is its own


def _is_plain_linear(module: nn.Linear | LoraLinear) -> bool:
    if not _is_untouched(module):
        return False
    if not isinstance(module, LoraLinear):
        return type(module) is nn.Linear
    return (
        type(module) is LoraLinear
        and type(module.base_layer) is nn.Linear
        and _is_untouched(module.base_layer)
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not module.fan_in_fan_out
        and all(layer.bias is None for layer in module.lora_B.values())
        and all(isinstance(d, nn.Identity | nn.Dropout) for d in module.lora_dropout.values())
    )


def _is_untouched(module: nn.Module) -> bool:
    """Nothing was put around its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)


def _candidates(
    module: nn.Module, linears: dict[nn.Module, FusedLinear]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    parts = dict(module.named_children())
    if not _is_untouched(module):
        return
    if parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        layers = tuple(linears.get(parts[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        if type(parts["act_fn"]).__name__ in ACTIVATIONS and None not in layers:
            yield "MLPs", FusedMlp(module, layers)  # type: ignore[arg-type]
    named = dict(module.named_parameters())
    if not parts and named.keys() == {"weight"} and isinstance(getattr(module, "variance_epsilon", None), float):
        yield "norms", FusedNorm(module)


def _agrees(module: nn.Module, fused: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Whether both forwards give the same for a few random tokens, but for rounding."""
    weight = next(module.parameters())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=draw).to(device, weight.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        want, got = module(x), fused(x)
    near = 8 * torch.finfo(want.dtype).eps
    return want.dtype == got.dtype and torch.allclose(got, want, rtol=near, atol=near * float(want.abs().max()))
