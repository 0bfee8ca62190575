"""Layers of a model evaluated with fewer passes and less kept for the backward pass. Floor 2.

Shapes: T tokens, I inputs, O outputs, r rank.

`fuse` gives the modules it knows another forward; their weights, names and saved form stay what they are. Known are
linear layers (torch's own, with peft's plain LoRA or without), gated MLPs of them, and RMS norms. What it does not
know, or what is set to something else at the moment of a call (adapters off, merged), goes the module's own way.

    linear   y = x W^T + b + s (x A^T) B^T: the adapter is added into the product; x and x A^T are kept, and of dropout
             which elements it left out. A frozen weight gets no gradient, and an input that needs none gets none.
    MLP      y = down(act(gate(x)) * up(x)): x, gate(x) and up(x) are kept, their product is computed again.
    norm     y = w x / rms(x): x is kept.

Products run in the dtype of autocast, in the weight's own without; what a layer rounds it rounds where the module's
own forward does. MLPs and norms are recognised by their parts, so each is compared with its own forward first.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strop.policy.kernels.dropout import draw_left_out
from strop.policy.kernels.elementwise import ACTIVATIONS, EAGER, Elementwise
from strop.policy.kernels.lora_products import LeftOut, Weights, gradients, products
from strop.policy.kernels.plain_layers import is_plain_linear, is_untouched
from strop.policy.kernels.quantised_weights import is_in_bytes, is_quantised, multiplies_in, quantised_weight
from strop.policy.kernels.weight_copies import WeightCopies

logger = logging.getLogger("strop")


# --- linear -----------------------------------------------------------------------------------------------------------


class _Linears(torch.autograd.Function):
    """Layers that read the same x [T, I]. left_out: what their adapters do not see of it. parameters: w, bias, a, b of
    every layer, which take the gradients; `layers` are multiplied with."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: tuple[Weights, ...], left_out: LeftOut, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, lows = products(layers, x, left_out)
        trains = ctx.needs_input_grad[3:]
        ctx.layers = layers
        ctx.save_for_backward(x if any(trains[0::4]) or any(trains[2::4]) else None, lows, *left_out)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, _, _, *trains = ctx.needs_input_grad
        x, lows, *left_out = ctx.saved_tensors
        found = gradients(ctx.layers, grads, trains, x, lows, left_out, wants_x=wants_x)
        return found.x, None, None, *found.weights


def _apply(layers: Sequence[FusedLinear], x: Tensor) -> list[Tensor]:
    """Outputs [..., O] of layers that read the same x [..., I]."""
    weights = tuple(layer.weights(x) for layer in layers)
    parameters = [p for layer in layers for p in layer.parameters]
    flat = x.reshape(-1, x.shape[-1]).to(weights[0].w.dtype)
    left_out = [layer.draw(flat) for layer in layers]
    with torch.autocast(x.device.type, enabled=False):
        outputs = _Linears.apply(flat, weights, left_out, *parameters)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


class SharedInput:
    """Layers of one module that read the same input, as q, k and v do: the first to be called computes for all of them,
    and the others find theirs, if they are called with the same tensor. So x is cast and kept once, and their gradients
    of it are added in the products."""

    def __init__(self, layers: tuple[FusedLinear, ...]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._state: tuple[int, bool] = (0, False)
        self._outputs: dict[int, Tensor] = {}

    def take(self, layer: FusedLinear, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        state = (x._version, torch.is_grad_enabled())
        if x is not self._input or state != self._state or id(layer) not in self._outputs:
            outputs = _apply(self.layers, x)
            self._input, self._state = x, state
            self._outputs = {id(n): y for n, y in zip(self.layers, outputs, strict=True)}
        out = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return out

    def forget(self) -> None:
        """What was computed and not yet taken, with all that came before it."""
        self._input, self._outputs = None, {}


class Fused(ABC):
    """Another forward of a module, for calls with one tensor and nothing else; any other call takes the module's own,
    which may mean something by what else it is given (a gate, a mask)."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and self.fits(args[0]):
            return self.forward(args[0])
        return type(self.module).forward(self.module, *args, **kwargs)

    def fits(self, x: Tensor) -> bool:
        """Whether the module is as it was when it was fused, and would compute with x in the same dtype."""
        return True

    @property
    @abstractmethod
    def reads(self) -> tuple[int, torch.dtype]:
        """Width and dtype of a token that it takes."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The fused forward."""


class FusedLinear(Fused):
    """The forward of a linear layer, plain or with a plain LoRA adapter."""

    module: nn.Linear | LoraLayer

    def __init__(self, module: nn.Linear | LoraLayer, weight_copies: WeightCopies) -> None:
        self.module, self.weight_copies = module, weight_copies
        self.shared: SharedInput | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and all(layer.fits(x) for layer in self.shared.layers):
            return self.shared.take(self, x)
        return _apply((self,), x)[0]

    @property
    def reads(self) -> tuple[int, torch.dtype]:
        base: Any = self.base
        if not is_quantised(base):
            return base.in_features, base.weight.dtype
        set_to = None if is_in_bytes(base) else base.compute_dtype
        return base.in_features, set_to or torch.get_default_dtype()

    @property
    def base(self) -> nn.Linear:
        """The layer under the adapter."""
        layer: Any = self.module.base_layer if isinstance(self.module, LoraLayer) else self.module
        assert isinstance(layer, nn.Linear)
        return layer

    def fits(self, x: Tensor) -> bool:
        """Whether the adapter is as it was when it was fused, on and not merged; and a quantised weight is not set to
        be multiplied in another dtype."""
        module, base = self.module, self.base
        if is_quantised(base) and not multiplies_in(base, compute_dtype(x.device) or x.dtype):
            return False
        if not isinstance(module, LoraLayer):
            return True
        return not module.disable_adapters and not module.merged and module.active_adapters == list(module.lora_A)

    @property
    def dropout(self) -> float:
        """Probability on the adapter's input."""
        if not isinstance(self.module, LoraLayer):
            return 0.0
        layer = next(iter(self.module.lora_dropout.values()))
        return float(layer.p) if isinstance(layer, nn.Dropout) and layer.training else 0.0

    def draw(self, x: Tensor) -> Tensor | None:
        """What the adapter leaves out of x, anew."""
        return draw_left_out(x, self.dropout) if self.dropout else None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """w, bias, a and b as they train."""
        if not isinstance(self.module, LoraLayer):
            return self.base.weight, self.base.bias, None, None
        ((name, a),) = self.module.lora_A.items()
        return self.base.weight, self.base.bias, a.weight, self.module.lora_B[name].weight

    def dtype(self, x: Tensor) -> torch.dtype:
        """That products with x are made in."""
        return compute_dtype(x.device) or (x.dtype if is_quantised(self.base) else self.base.weight.dtype)

    def weights(self, x: Tensor) -> Weights:
        """The same in the compute dtype; a quantised w as it is."""
        dtype = self.dtype(x)
        parameters = self.parameters
        if parameters[3] is not None and not torch.is_grad_enabled() and self.weight_copies.is_zero(parameters[3]):
            parameters = (*parameters[:2], None, None)  # as before the first step: the adapter adds nothing
        bias, a, b = (None if p is None else self.weight_copies(p, dtype) for p in parameters[1:])
        base = self.base
        w = quantised_weight(base, dtype) if is_quantised(base) else self.weight_copies(base.weight, dtype)
        scale = next(iter(self.module.scaling.values())) if isinstance(self.module, LoraLayer) else 1.0
        return Weights(w, bias, a, b, scale / (1 - self.dropout))


def compute_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# --- gated MLP --------------------------------------------------------------------------------------------------------


class _GatedMlp(torch.autograd.Function):
    """parameters: w, bias, a, b of gate, up and down, which take the gradients; `layers` are multiplied with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *_, layers, fused = rest
        left_out = [layer.draw(x) for layer in fused.layers[:2]]
        (g, u), lows = products(layers[:2], x, left_out)
        h = fused.elementwise.gated(g, u, fused.activation)
        left_out.append(fused.layers[2].draw(h))
        (y,), h_low = products(layers[2:], h, left_out[2:])
        ctx.layers, ctx.elementwise, ctx.activation = layers, fused.elementwise, fused.activation
        ctx.save_for_backward(x, g, u, lows, h_low, *left_out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, lows, h_low, *left_out = ctx.saved_tensors
        wants_x, *trains = ctx.needs_input_grad[:13]
        acted, h = ctx.elementwise.gated_again(g, u, ctx.activation)
        down = gradients(ctx.layers[2:], (grad,), trains[8:], h, h_low, left_out[2:], wants_x=True)
        assert down.x is not None
        d_gate_up = ctx.elementwise.gated_slopes(down.x, acted, g, u, ctx.activation)
        inner = gradients(ctx.layers[:2], d_gate_up, trains[:8], x, lows, left_out[:2], wants_x=wants_x)
        return inner.x, *inner.weights, *down.weights, None, None


class FusedMlp(Fused):
    """The forward of a gated MLP whose three layers are fused linear layers."""

    def __init__(self, module: nn.Module, layers: tuple[FusedLinear, ...], elementwise: Elementwise = EAGER) -> None:
        self.module, self.layers, self.elementwise = module, layers, elementwise
        self.activation = type(module.act_fn).__name__

    @property
    def reads(self) -> tuple[int, torch.dtype]:
        return self.layers[0].reads

    def fits(self, x: Tensor) -> bool:
        return all(layer.fits(x) for layer in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        parameters = [p for layer in self.layers for p in layer.parameters]
        weights = tuple(layer.weights(x) for layer in self.layers)
        flat = x.reshape(-1, x.shape[-1]).to(weights[0].w.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _GatedMlp.apply(flat, *parameters, weights, self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])


# --- RMS norm ---------------------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, elementwise: Elementwise) -> Tensor:
        y, scale = elementwise.norm(x, weight, eps)
        ctx.elementwise = elementwise
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weight = ctx.elementwise.norm_slopes(grad, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return d_x, d_weight, None, None


class FusedNorm(Fused):
    """The forward of an RMS norm."""

    def __init__(self, module: nn.Module, elementwise: Elementwise = EAGER) -> None:
        self.module, self.elementwise = module, elementwise

    @property
    def reads(self) -> tuple[int, torch.dtype]:
        weight: Any = self.module.weight
        return len(weight), weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.module.weight, self.module.variance_epsilon
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _RmsNorm.apply(x, weight, eps, self.elementwise)  # type: ignore[no-untyped-call]
        return y


# --- installing -------------------------------------------------------------------------------------------------------


PROBE_SIZES = (1.0, 30.0, 1000.0)
"""Of the random numbers that a module and its fused forward are compared with."""


def fuse(
    model: nn.Module,
    weight_copies: WeightCopies,
    device: torch.device,
    elementwise: Elementwise = EAGER,
    gathered: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> Counter[str]:
    """Fuse what is known in `model`, which is on its device; how many of each kind. elementwise: what MLPs and norms
    do element by element. gathered: a block in which a module has its whole weights."""
    done: Counter[str] = Counter()
    linears: dict[nn.Module, FusedLinear] = {}
    inside = {m.base_layer for m in model.modules() if isinstance(m, LoraLayer)}
    for module in model.modules():
        if module not in inside and isinstance(module, nn.Linear | LoraLayer) and is_plain_linear(module):
            linears[module] = FusedLinear(module, weight_copies)
            _replace_forward(module, linears[module])
            done["linear layers"] += 1
    for module in model.modules():
        _share_input(module, linears)
        for kind, fused in _candidates(module, linears, elementwise):
            with gathered(module):
                is_same = agrees(module, fused, device)
            if is_same:
                _replace_forward(module, fused)
                done[kind] += 1
    logger.debug("fused: %s", ", ".join(f"{n} {kind}" for kind, n in done.items()) or "nothing")
    return done


def unfuse(model: nn.Module) -> int:
    """Give all modules of `model` back their own forwards; how many had another."""
    fused = [m for m in model.modules() if isinstance(vars(m).get("forward"), Fused)]
    for module in fused:
        del vars(module)["forward"]
    return len(fused)


def forget_shared(model: nn.Module) -> None:
    """After a forward pass that failed: let nothing of it live on."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FusedLinear) and forward.shared is not None:
            forward.shared.forget()


def _share_input(module: nn.Module, linears: dict[nn.Module, FusedLinear]) -> None:
    parts = dict(module.named_children())
    layers = tuple(linears[parts[n]] for n in ("q_proj", "k_proj", "v_proj") if parts.get(n) in linears)
    if len(layers) == 3 and len({layer.base.in_features for layer in layers}) == 1:
        shared = SharedInput(layers)
        for layer in layers:
            layer.shared = shared


def _replace_forward(module: nn.Module, forward: Fused) -> None:
    vars(module)["forward"] = forward  # an object, not a bound method, so that a deep copy of a model is its own


def _candidates(
    module: nn.Module, linears: dict[nn.Module, FusedLinear], elementwise: Elementwise
) -> Iterator[tuple[str, Fused]]:
    parts = dict(module.named_children())
    if not is_untouched(module):
        return
    if parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        layers = tuple(linears.get(parts[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        if type(parts["act_fn"]).__name__ in ACTIVATIONS and None not in layers:
            yield "MLPs", FusedMlp(module, layers, elementwise)  # type: ignore[arg-type]
    named = dict(module.named_parameters())
    has_epsilon = isinstance(getattr(module, "variance_epsilon", None), float)
    if not parts and named.keys() == {"weight"} and named["weight"].dim() == 1 and has_epsilon:
        yield "norms", FusedNorm(module, elementwise)


def agrees(module: nn.Module, fused: Fused, device: torch.device) -> bool:
    """Whether both forwards give the same result, up to rounding and without dropout, for a few random tokens.

    Large tokens are tried too, so that a module which clamps large values is noticed; values that overflow are not
    compared. If the module cannot be called with one tensor, it is a module of another kind, whatever it raises.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return all(_same(module, fused, tokens) for tokens in _probes(fused, device))
    except Exception as error:  # noqa: BLE001 (code of any architecture is tried here)
        logger.debug("%s keeps its own forward: %s: %s", type(module).__name__, type(error).__name__, error)
        return False
    finally:
        module.train(training)


def _probes(fused: Fused, device: torch.device) -> Iterator[Tensor]:
    width, dtype = fused.reads
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    return ((size * x).to(device, dtype) for size in PROBE_SIZES)


def _same(module: nn.Module, fused: Fused, tokens: Tensor) -> bool:
    want, got = module(tokens), fused.forward(tokens)
    near, known = 8 * torch.finfo(want.dtype).eps, want.isfinite()
    most = float(want[known].abs().max()) if bool(known.any()) else 0.0
    return want.dtype == got.dtype and torch.allclose(got[known], want[known], rtol=near, atol=near * most)
