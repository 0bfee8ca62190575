"""What fused layers do element by element: plain functions, or each compiled into few passes over memory. Floor 2.

Shapes: D width, I inner width of an MLP; any dimensions before. A function that takes an argument over says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.errors import ConfigError

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "SiLUActivation": (F.silu, torch.ops.aten.silu_backward),
    "SiLU": (F.silu, torch.ops.aten.silu_backward),
    "GELUTanh": (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}
"""Class of the activation -> (x -> act(x)), ((gradient, x) -> gradient of x)."""


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(w x / rms(x), 1 / rms(x)) of x [..., D]; rms in float32 at least."""
    exact = _exact(x)
    scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return exact.mul(scale).to(x.dtype) * weight, scale


def _norm_slopes(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, trains: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where it trains, of the weight [D]."""
    # with n = x / rms(x), d = w grad:  d x = (d - n mean(d n)) / rms(x)
    exact, grad = _exact(x), _exact(grad)
    d_weight = (grad * exact).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype) if trains else None
    d = grad * weight.to(grad.dtype)  # factors of two dtypes would be slow
    along = torch.linalg.vecdot(d, exact).unsqueeze(-1).mul_(scale**3 / x.shape[-1])
    return d.mul_(scale).addcmul_(exact, along, value=-1).to(x.dtype), d_weight


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) up, of [..., I] both."""
    return ACTIVATIONS[activation][0](gate).mul_(up)


def _gated_again(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(act(gate), act(gate) up)."""
    acted = ACTIVATIONS[activation][0](gate)
    return acted, acted * up


def _gated_slopes(grad: Tensor, acted: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. Takes over `grad` and `acted`."""
    d_up = acted.mul_(grad)
    return ACTIVATIONS[activation][1](grad.mul_(up), gate), d_up


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Elementwise(NamedTuple):
    """The functions above, in one way to run them."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_slopes: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    gated_again: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    gated_slopes: Callable[[Tensor, Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]


EAGER = Elementwise(_norm, _norm_slopes, _gated, _gated_again, _gated_slopes)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(function, dynamic=True)

    def call(*args: Any) -> Any:
        # no graph is built here, and for inputs of one torch would compile again
        return fast(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    return call


@cache
def compiled(device: torch.device) -> Elementwise:
    """The functions compiled for any number of tokens, once one of them is seen to compile.

    Raises:
        ConfigError: none does, for want of a compiler.
    """
    functions = Elementwise(*(_compile(function) for function in EAGER))
    gate, up = torch.ones(2, 3, 5, device=device)
    try:
        functions.gated(gate, up, "SiLU")
    except RuntimeError as error:  # torch's own, whatever the compiler behind it raised
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"torch.compile failed: {lines[0] if lines else type(error).__name__}",
            where="training.torch_compile: true",
            expected="a C++ compiler on a CPU, Triton on a GPU",
            fix="install it, or set training.torch_compile to false",
        ) from error
    return functions
