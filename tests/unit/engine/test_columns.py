"""A column and an objective that reads it, made here: neither batch nor engine has to know of either."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from strop.batch import Batch, Scores, TokenScores, pack, pad
from strop.columns import Columns, Structure, Unit, completions, tokens
from strop.config.methods import KtoSettings, OrpoSettings, SftSettings
from strop.engine.step import check_columns, forward_backward
from strop.engine.validation import evaluate
from strop.errors import ConfigError
from strop.objectives.base import Mean, Objective, build_objective
from strop.types import Completion, Group, Origin
from strop.world import World
from worlds import in_worlds

SIZES = (3, 1, 8, 3, 1, 1, 8)
"""Completions of each group."""


class Clipped(Objective[SftSettings]):
    """A clipped policy gradient with an entropy bonus: reads a column of each level, and one of the policy."""

    METRICS: ClassVar[Mapping[str, str]] = {"clipped": "share of tokens", "solved": "share of groups"}

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"advantages", "old_logps", "solved", "entropy"})

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"policy": tokens, "entropy": completions}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        ratio = (scores.logps - scores["old_logps"]).exp()
        advantage = scores["advantages"][scores.completion_index]
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return {"policy": scores.sums(policy).sum(), "entropy": -0.01 * (scores.sums(scores["entropy"])).sum()}

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        outside = ((scores.logps - scores["old_logps"]).abs() > 0.2).sum()
        solved = scores["solved"]
        return {"clipped": (outside, scores.structure.num_tokens), "solved": (solved.sum(), len(solved))}


class Centred(Objective[SftSettings]):
    """Means over the whole step, of all that a policy gives with gradients: the log-probs of completions and of
    prompts, and a column of its own."""

    METRICS: ClassVar[Mapping[str, str]] = {}

    @property
    def whole_step(self) -> bool:
        return True

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"prompt_logps", "entropy", "frozen"})

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"loss": completions}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        prompts = scores["prompt_logps"].double().mean()
        apart = scores.sums(scores.logps * scores["frozen"]) - prompts * scores["entropy"].mean()
        return {"loss": (apart.square() * scores.sums(scores["entropy"]).tanh()).sum()}

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        return {}


class Bigram(nn.Module):
    """Log-probs and entropy of a token given the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def forward(self, batch: Batch) -> TokenScores:
        rows = self.table[batch.input_ids.flatten()[batch.scored_positions]].log_softmax(-1)
        logps = rows.gather(1, batch.targets[:, None])[:, 0]
        entropy = -(rows.exp() * rows).sum(-1)
        return batch.token_scores(logps, entropy=entropy, frozen=entropy.detach())


def make_groups() -> list[Group]:
    draw = torch.Generator().manual_seed(1)

    def ids(least: int, most: int) -> array[int]:
        n = int(torch.randint(least, most, (), generator=draw))
        return array("i", torch.randint(9, (n,), generator=draw).tolist())

    groups = []
    for i, size in enumerate(SIZES):
        answers = [ids(1, 7) for _ in range(size)]
        masks = [bytes([0] * (len(a) // 3) + [1] * (len(a) - len(a) // 3)) for a in answers]
        made = tuple(Completion(a, m) for a, m in zip(answers, masks, strict=True))
        groups.append(Group(ids(1, 5), made, Origin("sampled", i + 1)))
    return groups


def make_columns(groups: list[Group]) -> list[Columns]:
    """Of each group, as a source of steps has them."""
    draw = torch.Generator().manual_seed(2)
    return [
        Columns(
            per_token={"old_logps": -3 * torch.rand(g.num_scored, generator=draw, dtype=torch.float64)},
            per_completion={"advantages": torch.randn(len(g.completions), generator=draw, dtype=torch.float64)},
            per_group={"solved": torch.tensor([len(g.completions) > 1])},
        )
        for g in groups
    ]


def batches(cuts: list[int], layout=pack, wants: frozenset[str] = frozenset({"entropy"})) -> list[Batch]:  # type: ignore[no-untyped-def]
    groups, columns = make_groups(), make_columns(make_groups())
    bounds = [0, *cuts, len(groups)]
    return [layout(groups[a:b], Columns.join(columns[a:b]), wants) for a, b in pairwise(bounds)]


def by_hand(table: Tensor) -> Tensor:
    """The loss, one token after the other."""
    policy, entropy, num_tokens = [], [], 0
    groups = make_groups()
    for group, columns in zip(groups, make_columns(groups), strict=True):
        old = iter(columns.per_token["old_logps"])
        for completion, advantage in zip(group.completions, columns.per_completion["advantages"], strict=True):
            row = [*group.prompt_ids, *completion.ids]
            for j, trained in enumerate(completion.loss_mask, start=len(group.prompt_ids)):
                if trained:
                    logps = table[row[j - 1]].log_softmax(-1)
                    ratio = (logps[row[j]] - next(old)).exp()
                    policy.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
                    entropy.append(-(logps.exp() * logps).sum())
                    num_tokens += 1
    return torch.stack(policy).sum() / num_tokens - 0.01 * torch.stack(entropy).sum() / sum(SIZES)


@pytest.mark.parametrize("layout", [pack, pad])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4, 5, 6], [3, 5]], ids=str)
def test_groups_of_unlike_sizes_and_a_new_column(cuts: list[int], layout) -> None:  # type: ignore[no-untyped-def]
    policy, objective = Bigram(), Clipped(SftSettings())
    expected = by_hand(policy.table)
    (gradient,) = torch.autograd.grad(expected, policy.table)
    check_columns(objective, policy={"entropy"}, source=make_columns(make_groups())[0].names, also=())
    found = forward_backward(policy, objective, batches(cuts, layout)).fetch()
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert policy.table.grad is not None
    torch.testing.assert_close(policy.table.grad, gradient, rtol=1e-10, atol=1e-13)
    solved, count = found.metrics["solved"]
    assert (solved, count) == (sum(size > 1 for size in SIZES), len(SIZES))
    assert evaluate(policy, objective, batches(cuts, layout)).fetch().loss == pytest.approx(found.loss, rel=1e-12)


def whole_step(world: World, cuts: list[int], layout) -> tuple[float, Tensor]:  # type: ignore[no-untyped-def]
    """The loss of `Centred` and its gradient, summed over all processes."""
    policy, objective = Bigram(), Centred(SftSettings())
    own = batches(cuts, layout, objective.reads)[world.rank :: world.size]
    found = forward_backward(policy, objective, own, world=world)
    world.sum_gradients(policy.parameters())
    assert policy.table.grad is not None
    return found.fetch().loss, policy.table.grad


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", [pack, pad])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5, 6], [3, 5]], ids=str)
def test_a_statistic_of_the_step_reads_whatever_the_policy_gives(cuts: list[int], layout, size: int) -> None:  # type: ignore[no-untyped-def]
    """Also with more processes than micro-batches."""
    loss, gradient = whole_step(World.alone("cpu"), [], pack)  # one micro-batch: no second pass
    for found, slopes in in_worlds(size, lambda world: whole_step(world, cuts, layout)):
        assert found == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(slopes, gradient, rtol=1e-10, atol=1e-13)


def test_units_of_ones_own() -> None:
    """A unit is any function of the structure that adds up over micro-batches."""

    def longest_budget(structure: Structure) -> int:
        return 7 * structure.num_completions

    class Constant(Clipped):
        @property
        def units(self) -> Mapping[str, Unit]:
            return {"policy": longest_budget, "entropy": completions}

    losses = [forward_backward(Bigram(), Constant(SftSettings()), batches(cuts)).fetch() for cuts in ([], [2, 4])]
    assert losses[0].terms["policy"] == pytest.approx(losses[1].terms["policy"], rel=1e-12)
    plain = forward_backward(Bigram(), Clipped(SftSettings()), batches([])).fetch()
    num_tokens = sum(g.num_scored for g in make_groups())
    assert losses[0].terms["policy"] == pytest.approx(plain.terms["policy"] * num_tokens / (7 * sum(SIZES)), rel=1e-12)


def test_what_nothing_supplies_is_refused_before_the_first_step() -> None:
    objective = Clipped(SftSettings())
    with pytest.raises(ConfigError, match=r"Clipped reads advantages, which nothing supplies") as refused:
        check_columns(objective, policy={"entropy"}, source={"old_logps", "solved"}, also=())
    assert "a column of the policy (entropy) or of the step source (old_logps, solved)" in str(refused.value)
    everything = {"advantages", "old_logps", "solved"}
    with pytest.raises(ConfigError, match="entropy: supplied by both the policy and the step source"):
        check_columns(objective, policy={"entropy"}, source={*everything, "entropy"}, also=())
    with pytest.raises(ConfigError, match="reads the scores of mismatched groups, which nothing supplies"):
        check_columns(build_objective(KtoSettings()), policy=(), source={"ref_logps", "labels"}, also=())
    check_columns(build_objective(OrpoSettings(orpo_nll="full")), policy={"prompt_logps"}, source=(), also=())
