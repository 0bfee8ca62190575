"""One optimizer step of a real model in float64: however it is cut, packed or padded, loss and gradients are the same.

The oracle is plain transformers: the causal language model on padded rows, full logits, log_softmax.
"""

from __future__ import annotations

import copy
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from one_step import Float64Torch, batches_for, by_budget, make_groups
from scored import ref_columns
from strop.batch import Batch, TokenScores, pack, pad
from strop.config.methods import CpoSettings, KtoSettings, MethodSettings, OrpoSettings, SftSettings, SimpoSettings
from strop.config.sections import ModelSection
from strop.engine.step import StepScores, forward_backward
from strop.objectives.base import build_objective
from strop.policy.build import assemble
from strop.policy.model.load import LoadedModel
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.types import Completion, Group
from strop.world import World
from variants import dpo, name
from worlds import in_worlds

SETTINGS: list[MethodSettings] = [
    SftSettings(),
    SftSettings(loss_reduction="sequences"),
    dpo(),
    dpo(sft_weight=0.5, ld_alpha=0.5),
    dpo(wpo_weighting=True),
    dpo("kto_pair", wpo_weighting=True),
    *(dpo(loss) for loss in ("ipo", "kto_pair", "bco_pair", "aot", "aot_unpaired")),
    OrpoSettings(),
    OrpoSettings(orpo_nll="full"),
    SimpoSettings(),
    CpoSettings(),
    KtoSettings(),
]
"""One of each way to sum: the cut of the others is that of `tests/unit/engine/test_step.py`."""
RELATIVE = 1e-9


class PlainTransformers(nn.Module):
    """The model's own forward on padded rows: the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> TokenScores:
        assert batch.attention_mask is not None
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        everything = logits.flatten(0, 1)[batch.scored_positions].log_softmax(-1)
        logps = everything.gather(1, batch.targets[:, None]).squeeze(1)
        return batch.token_scores(logps, collisions=everything.exp().square().sum(-1).log().detach())


@pytest.fixture
def model(make_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    built = make_model(dtype=torch.float64)
    monkeypatch.setattr(sys.modules[type(built).__module__], "torch", Float64Torch())
    return built


def policy_of(model: nn.Module) -> Policy:
    own = copy.deepcopy(model)
    section = ModelSection(huggingface_id="tiny")
    loaded = LoadedModel(own, torch.float64, copy.deepcopy(own.config))
    policy = assemble(own, loaded, Precision(torch.float64), section, fp32_logits=False)
    assert policy.share_prefix
    return policy


def one_step(
    forward: nn.Module, settings: MethodSettings, batches_of: Callable[..., list[Batch]]
) -> tuple[float, dict[str, Tensor]]:
    objective = build_objective(settings)
    forward.zero_grad()
    result = forward_backward(forward, objective, *batches_for(objective, batches_of))
    gradients = {n.removeprefix("model."): p.grad.clone() for n, p in forward.named_parameters() if p.grad is not None}
    return result.fetch().loss, gradients


def in_parts(sizes: Sequence[int], layout: Callable[..., Batch]) -> Callable[..., list[Batch]]:
    def batches(groups: Sequence[Group], refs: Sequence[Tensor], wants: Iterable[str] = ()) -> list[Batch]:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return [layout(groups[a:b], ref_columns(refs[a:b]), wants) for a, b in pairwise(bounds)]

    return batches


CUTS: dict[str, Callable[..., list[Batch]]] = {
    "1x8": in_parts([1] * 8, pack),
    "8x1 padded": in_parts([8], pad),
    "2x4 padded": in_parts([4, 4], pad),
    "budget 60": by_budget(60),
    "budget 200": by_budget(200),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_every_cut_and_layout_is_the_same_step(settings: MethodSettings, model: nn.Module) -> None:
    loss, gradients = one_step(PlainTransformers(copy.deepcopy(model)), settings, in_parts([8], pad))
    assert all(torch.isfinite(g).all() for g in gradients.values()) and gradients["lm_head.weight"].norm() > 0
    policy = policy_of(model)
    for how, batches_of in {"8x1": in_parts([8], pack), **CUTS}.items():
        cut_loss, cut_gradients = one_step(policy, settings, batches_of)
        assert cut_loss == pytest.approx(loss, rel=RELATIVE), how
        assert cut_gradients.keys() == gradients.keys()
        for weight, expected in gradients.items():
            error = float((cut_gradients[weight] - expected).norm() / expected.norm())
            assert error < RELATIVE, f"{how}: gradient of {weight}"


def test_a_completion_does_not_see_its_sibling(model: nn.Module) -> None:
    policy = policy_of(model)
    (group, *_) = make_groups("pair")
    chosen, rejected = group.completions
    other = Completion(array("i", [(t + 7) % 400 for t in chosen.ids]), chosen.loss_mask)
    with policy.scoring():
        before = policy(pack([group])).logps
        after = policy(pack([Group(group.prompt_ids, (other, rejected), group.origin)])).logps
    n = chosen.num_scored
    assert torch.equal(before[n:], after[n:]), "bit for bit"
    assert not torch.equal(before[:n], after[:n])


@pytest.mark.share(2)
@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize(
    "settings", [SftSettings(), dpo(), dpo("kto_pair"), KtoSettings(), OrpoSettings(), SimpoSettings()], ids=name
)
def test_processes_take_the_step_that_one_takes(settings: MethodSettings, size: int, model: nn.Module) -> None:
    """Losses, metrics and margins in every process are those of one; of nine, some have no micro-batch at all."""
    objective, policies = build_objective(settings), [policy_of(model) for _ in range(size + 1)]
    batches, also = batches_for(objective, by_budget(60))
    alone = forward_backward(policies[-1], objective, batches, also)
    assert 2 < len(batches) < 9

    def work(world: World) -> StepScores:
        policy, own = policies[world.rank], {name: some[world.rank :: world.size] for name, some in also.items()}
        found = forward_backward(policy, objective, batches[world.rank :: world.size], own, world=world)
        world.sum_gradients(policy.trainable().values())
        return found

    expected = alone.fetch()
    for result in in_worlds(size, work):
        found = result.fetch()
        assert found.loss == pytest.approx(expected.loss, rel=RELATIVE)
        assert found.terms == pytest.approx(expected.terms, rel=RELATIVE)
        for metric, (total, count) in expected.metrics.items():
            assert found.metrics[metric] == (pytest.approx(total, rel=RELATIVE, abs=1e-12), count)
        if expected.margins is not None:
            assert found.margins is not None
            assert sorted(found.margins.tolist()) == pytest.approx(sorted(expected.margins.tolist()), rel=RELATIVE)
    gradients = {n: p.grad for n, p in policies[-1].trainable().items()}
    for policy in policies[:size]:
        for weight, parameter in policy.trainable().items():
            whole = gradients[weight]
            assert parameter.grad is not None and whole is not None
            assert float((parameter.grad - whole).norm() / whole.norm()) < RELATIVE, weight
