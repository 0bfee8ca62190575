"""One step of a sharded policy in several real processes, in float64: loss and gradients are those of one process."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from conftest import build_model
from one_step import Float64Torch, batches_for, by_budget
from processes import in_processes
from strop.config import RunConfig
from strop.config.methods import KtoSettings, MethodSettings, OrpoSettings, SftSettings, SimpoSettings
from strop.config.sections import GpuSection, LoraSection, ModelSection
from strop.device import start_world
from strop.engine.step import forward_backward
from strop.objectives.base import build_objective
from strop.policy.build import assemble, strategy_of
from strop.policy.gradient_checkpointing import checkpoint_layers
from strop.policy.model.adapters import add_adapters
from strop.policy.model.load import LoadedModel
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.world import World
from variants import dpo

SETTINGS: dict[str, MethodSettings] = {
    "sft": SftSettings(),
    "dpo": dpo(),
    "kto_pair": dpo("kto_pair"),
    "kto": KtoSettings(),
    "orpo": OrpoSettings(),
    "simpo": SimpoSettings(),
}
"""One method of each kind."""
MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "full tied": {"tied": True},
    "lora": {"lora": LoraSection(enabled=True, r=4, lora_dropout=0.0)},
    "lora saved": {"lora": LoraSection(enabled=True, r=2, lora_dropout=0.0, modules_to_save=("lm_head",))},
    "lora tied": {"lora": LoraSection(enabled=True, r=4, lora_dropout=0.0), "tied": True},
    "recomputed": {"recomputed": 0.5},
    "plain rows": {"share_prefix": False},
}
RELATIVE = 1e-9


class Case(NamedTuple):
    """budget: tokens of a micro-batch; a large one leaves all but one process without any."""

    method: str
    model: str
    shard_size: int | None
    budget: int


def policy_of(case: Case, world: World | None) -> Policy:
    """Sharded over the processes of `world`; None: not."""
    how = MODELS[case.model]
    model = build_model(dtype=torch.float64, tie_word_embeddings=how.get("tied", False))
    vars(sys.modules[type(model).__module__])["torch"] = Float64Torch()
    section = ModelSection(huggingface_id="tiny")
    loaded = LoadedModel(model, torch.float64, copy.deepcopy(model.config))
    module: nn.Module = model
    if "lora" in how:
        module = add_adapters(model, how["lora"], section, seed=1, master=torch.float64)
        for weight in module.parameters():
            if weight.requires_grad and not weight.any():
                nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(2))
    checkpoint_layers(module, how.get("recomputed", 0.0), random=False, where="tiny")
    place = None
    if world is not None:
        gpu = GpuSection(fsdp=True, shard_size=case.shard_size)
        place = strategy_of(RunConfig(models=[section], gpu=gpu), world)
    policy = assemble(module, loaded, Precision(torch.float64), section, fp32_logits=False, place=place)
    policy.share_prefix = how.get("share_prefix", True)
    return policy


def errors_of(case: Case, world: World) -> dict[str, float]:
    """How far loss, norm and gradients of this case are from those of one process, relative."""
    objective = build_objective(SETTINGS[case.method])
    batches, also = batches_for(objective, by_budget(case.budget))
    alone, sharded = policy_of(case, None), policy_of(case, world)
    expected = forward_backward(alone, objective, batches, also).fetch().loss
    own = {name: some[world.rank :: world.size] for name, some in also.items()}
    strategy = sharded.strategy
    passes = forward_backward(
        sharded, objective, batches[world.rank :: world.size], own, world=world, idle=strategy.idle
    )
    strategy.sum_gradients()
    errors = {"loss": abs(passes.fetch().loss / expected - 1)}
    gradients = {name: weight.grad for name, weight in alone.trainable().items()}
    own_rows = {name: weight.grad for name, weight in strategy.trained.items()}
    assert gradients.keys() == own_rows.keys() and all(g is not None for g in own_rows.values())
    whole = strategy.to_save(own_rows, {name: name for name in own_rows})  # type: ignore[arg-type]
    for weight, found in strategy.whole(whole):
        there = gradients[weight]
        assert there is not None
        if world.is_main:
            errors[weight] = float((found - there).norm() / there.norm())
    norm = torch.nn.utils.get_total_norm([g for g in gradients.values() if g is not None])
    limit = 0.5 * float(norm)
    errors["norm"] = float(abs(strategy.clip(limit) / norm - 1))
    clipped = sum(float(p.tensor.grad.square().sum()) for p in strategy.pieces.values() if p.counts)  # type: ignore
    errors["clipped"] = abs(float(strategy.sum(torch.tensor(clipped))) ** 0.5 / limit - 1)
    return errors


def all_errors(cases: list[Case]) -> dict[Case, dict[str, float]]:
    torch.use_deterministic_algorithms(True)
    with start_world(GpuSection()) as world:
        return {case: errors_of(case, world) for case in cases}


def assert_small(found: dict[Case, dict[str, float]]) -> None:
    for case, errors in found.items():
        large = {name: error for name, error in errors.items() if not error < RELATIVE}
        if errors["clipped"] < 1e-4:  # torch divides by the norm + 1e-6
            large.pop("clipped", None)
        assert not large, case


FEW = [
    Case("sft", "full", None, 60),
    Case("dpo", "lora", None, 60),
    Case("kto_pair", "full tied", None, 1000),
    Case("kto", "lora saved", None, 60),
]


def test_two_processes() -> None:
    for found in in_processes(2, all_errors, FEW):
        assert_small(found)


@pytest.mark.nightly
def test_replicas_of_two_processes() -> None:
    cases = [Case("orpo", "full tied", 2, 60), Case("sft", "recomputed", None, 60)]
    for found in in_processes(4, all_errors, cases):
        assert_small(found)


@pytest.mark.nightly
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("size", "shard_size"), [(2, None), (3, None), (4, None), (4, 2)])
def test_every_method_and_model(size: int, shard_size: int | None, model: str, method: str) -> None:
    cases = [Case(method, model, shard_size, budget) for budget in (40, 1000)]
    for found in in_processes(size, all_errors, cases):
        assert_small(found)
