"""Learning rates, decay groups and optimizer state."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from strop.config.sections import TrainingSection
from strop.engine.optim import (
    BITSANDBYTES,
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    require_optimizer,
    set_optimizer_numbers,
    set_rate,
    state_bytes,
    without_gradient,
)
from strop.errors import ConfigError


def section(**changes: object) -> TrainingSection:
    return TrainingSection(**{"learning_rate": 1e-3, "warmup_steps": 0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_agree_with_transformers_after_the_warmup(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(1, 21):
        if step > warmup:
            ours = learning_rate(step, 20, section(lr_scheduler=name, warmup_steps=warmup))
            assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_no_step_of_the_warmup_is_wasted() -> None:
    rates = [learning_rate(s, 20, section(warmup_steps=4)) for s in range(1, 7)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert all(r > 0 for r in rates)
    assert learning_rate(2, 20, section(warmup_steps=None, warmup_ratio=0.2)) == rates[1]


def test_vectors_are_not_decayed() -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(dict(layer.named_parameters()), section(weight_decay=0.1))
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decayed[id(p)] for n, p in layer.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_second_matrices_of_adapters_learn_faster() -> None:
    """As the optimizer itself has it: with `sgd` a step is the rate times the gradient."""
    names = ("m.lora_A.weight", "m.lora_B.weight", "e.lora_embedding_B", "m.bias")
    weights = {name: nn.Parameter(torch.zeros(2, *[2] * ("bias" not in name))) for name in names}
    optimizer = build_optimizer(weights, section(optim="sgd", weight_decay=0.0), 16.0)
    set_rate(optimizer, 0.25)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [float(weight.detach().mean()) for weight in weights.values()] == [-0.25, -4.0, -4.0, -0.25]
    plain = build_optimizer(weights, section(optim="sgd"))
    set_rate(plain, 0.25)
    assert {group["lr"] for group in plain.param_groups} == {0.25}


EVERY = list(get_args(TrainingSection.model_fields["optim"].annotation))


@pytest.fixture(params=EVERY)
def optim(request: pytest.FixtureRequest) -> str:
    if request.param in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    return str(request.param)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")  # of the plain one
def test_steps_are_those_of_the_package_itself(optim: str) -> None:
    """On a weight of more than 4096 numbers, of which bitsandbytes keeps the state in 8 bits."""
    theirs: dict[str, Any] = {
        "adamw_torch": torch.optim.AdamW,
        "adamw_torch_fused": torch.optim.AdamW,
        "adafactor": torch.optim.Adafactor,
        "sgd": torch.optim.SGD,
    }
    ours, other = (nn.Parameter(torch.linspace(-1, 1, 6144).reshape(96, 64)) for _ in range(2))
    optimizer = build_optimizer({"w": ours}, section(optim=optim, weight_decay=0.1, learning_rate=1e-2))
    if optim in theirs:
        plain = theirs[optim]([other], lr=1e-2, weight_decay=0.1)
    else:
        import bitsandbytes

        plain = getattr(bitsandbytes.optim, BITSANDBYTES[optim].name)([other], lr=1e-2, weight_decay=0.1)
    before = ours.detach().clone()
    for step in range(3):
        torch.manual_seed(step)
        gradient = torch.randn(96, 64)
        ours.grad, other.grad = gradient, gradient.clone()
        set_rate(optimizer, 1e-2)
        optimizer.step()
        plain.step()
    assert not torch.equal(ours, before)
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


def test_the_estimate_knows_the_state(optim: str) -> None:
    weight = nn.Parameter(torch.randn(256, 512))
    optimizer = build_optimizer({"w": weight}, section(optim=optim))
    tensors, _ = optimizer_tensors(optimizer, {"w": weight})
    tables = ("qmap", "absmax", "step")
    held = sum(t.nbytes for name, t in tensors.items() if not any(word in name for word in tables)) / weight.numel()
    assert state_bytes(optim, 4) == pytest.approx(held, abs=0 if optim != "adafactor" else 1)


def test_state_goes_out_and_in_exactly(optim: str) -> None:
    settings = section(optim=optim, weight_decay=0.1)

    def model() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(96, 64)  # more than 4096 weights: bitsandbytes keeps smaller tensors in 32 bits

    def train(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for s in steps:
            torch.manual_seed(s)
            layer(torch.randn(5, 96)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    unbroken = model()
    optimizer = build_optimizer(dict(unbroken.named_parameters()), settings)
    train(unbroken, optimizer, range(3))
    tensors, numbers = optimizer_tensors(optimizer, dict(unbroken.named_parameters()))
    saved = {k: v.clone() for k, v in tensors.items()}
    weights = {k: v.clone() for k, v in unbroken.state_dict().items()}
    train(unbroken, optimizer, range(3, 5))

    resumed = model()
    other = build_optimizer(dict(resumed.named_parameters()), settings)
    into, _ = optimizer_tensors(other, dict(resumed.named_parameters()))
    for name, parameter in model().named_parameters():
        assert torch.equal(parameter, dict(resumed.named_parameters())[name]), "making the state moved a weight"
    assert {k: (v.shape, v.dtype) for k, v in into.items()} == {k: (v.shape, v.dtype) for k, v in saved.items()}
    for k, v in saved.items():
        into[k].copy_(v)
    set_optimizer_numbers(other, dict(resumed.named_parameters()), numbers)
    resumed.load_state_dict(weights)
    train(resumed, other, range(3, 5))
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_an_absent_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strop.engine.optim.find_spec", lambda name: None)
    for name in EVERY:
        if name in BITSANDBYTES:
            with pytest.raises(ConfigError, match="the extra `bnb`"):
                require_optimizer(section(optim=name))
        else:
            require_optimizer(section(optim=name))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit"])
def test_the_first_step_after_a_look_at_the_state_is_the_first(optim: str) -> None:
    """A checkpoint may be written before any step: all so far may have been skipped."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    moved = []
    for looks in (False, True):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = build_optimizer({"w": weight}, section(optim=optim, learning_rate=1.0, weight_decay=0.0))
        if looks:
            optimizer_tensors(optimizer, {"w": weight})
        weight.grad = torch.ones(1)
        optimizer.step()
        moved.append(float(weight.detach()))
    assert moved[0] == moved[1] == pytest.approx(-1.0, rel=1e-4)


def test_weights_without_a_gradient_have_a_state_too(optim: str) -> None:
    """Else a checkpoint of theirs could not be resumed. Neither they nor the others move by it."""
    weights = {name: nn.Parameter(torch.full((96, 64), value)) for name, value in (("used", 1.0), ("unused", 2.0))}
    optimizer = build_optimizer(weights, section(optim=optim, weight_decay=0.1))
    for _ in range(2):
        weights["used"].grad = torch.ones(96, 64)
        optimizer.step()
    before = {name: w.detach().clone() for name, w in weights.items()}
    moments = {k: v.clone() for k, v in optimizer.state[weights["used"]].items() if isinstance(v, torch.Tensor)}
    tensors, numbers = optimizer_tensors(optimizer, weights)
    keys = {name: {k.split(".")[1] for k in [*tensors, *numbers] if k.endswith(f".{name}")} for name in weights}
    assert keys["used"] == keys["unused"] and (keys["used"] or optim == "sgd")
    assert all(torch.equal(w, before[name]) for name, w in weights.items())
    assert torch.equal(weights["used"].grad, torch.ones(96, 64)) and weights["unused"].grad is None
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state[weights["used"]].items() if k in moments)
    assert all(float(v.float().abs().max()) == 0 for k, v in tensors.items() if "exp_avg" in k and "unused" in k)
    assert str(without_gradient(weights)).startswith("1 of 2 trained tensors got no gradient and stay unchanged: un")
    weights["unused"].grad = torch.zeros(96, 64)
    assert without_gradient(weights) is None
