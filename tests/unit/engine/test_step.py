"""A step's loss and gradients do not depend on how it is cut, for every objective."""

from __future__ import annotations

import weakref
from array import array
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papers import Step, step_loss
from scored import beside, ref_columns
from strop.batch import Batch, Scores, TokenScores, pack, pad
from strop.columns import Columns
from strop.config.methods import KtoSettings, MethodSettings, SftSettings
from strop.engine.step import StepNumbers, StepScores, forward_backward, suspect_rows
from strop.engine.validation import evaluate
from strop.objectives.advantages import normalised_sum
from strop.objectives.base import build_objective
from strop.types import Completion, Group, Origin
from variants import SETTINGS, dpo, name


class Bigram(nn.Module):
    """The log-probs of a token given the one before it: the smallest policy that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.dropout = nn.Dropout(0.0)
        self.num_calls = 0

    def forward(self, batch: Batch) -> TokenScores:
        self.num_calls += 1
        before = batch.input_ids.flatten()[batch.scored_positions]
        everything = self.dropout(self.table[before]).log_softmax(-1)
        logps = everything.gather(1, batch.targets[:, None]).squeeze(1)
        entropies = -(everything.exp() * everything).sum(-1)
        return batch.token_scores(logps, collisions=(2 * everything).logsumexp(-1).detach(), entropies=entropies)


def make_groups(rows: str) -> list[Group]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> array[int]:
        return array("i", torch.randint(12, (n,), generator=generator).tolist())

    groups = []
    for i in range(8):
        answers = tuple(Completion(draw(n), b"\1" * n) for n in ((3 + i, 2 + i % 3)))
        label = i % 2 == 0 if rows == "labelled" else None
        if rows == "group":
            answers = tuple(Completion(draw(n), b"\1" * n) for n in (3 + i, 2, 4, 1)[: 2 + i % 3])
            groups.append(Group(draw(2 + i % 4), answers, Origin("rows", i + 1), numbers=make_numbers(answers, i)))
            continue
        groups.append(Group(draw(2 + i % 4), answers if rows == "pair" else answers[:1], Origin("rows", i + 1), label))
    return groups


def make_numbers(answers: tuple[Completion, ...], i: int) -> dict[str, array[float]]:
    """Rewards, all the same in one group, and log-probs near those of the table."""
    generator = torch.Generator().manual_seed(100 + i)
    num_tokens = sum(len(c.ids) for c in answers)
    rewards = [0.0 if i == 5 else float((n + i) % 3) / 2 for n in range(len(answers))]
    old = -2.5 + torch.rand(num_tokens, generator=generator).double()
    sampler = old + 0.1 * torch.randn(num_tokens, generator=generator).double()
    numbers = {"rewards": rewards, "normalised_rewards": normalised_sum([rewards], [2.0])}
    return {name: array("d", x) for name, x in {**numbers, "old_logps": old, "sampler_logps": sampler}.items()}


def make_others(groups: list[Group]) -> list[Group]:
    """Each prompt with the first completion of the next one."""
    return [replace(g, completions=groups[i - 1].completions[:1], label=None, numbers={}) for i, g in enumerate(groups)]


def run(settings: MethodSettings, cuts: list[int], layout=pack) -> tuple[StepNumbers, Tensor, int]:  # type: ignore[no-untyped-def]
    objective = build_objective(settings)
    policy, groups = Bigram(), make_groups(objective.rows)
    generator = torch.Generator().manual_seed(2)
    refs = [-torch.rand(g.num_scored, generator=generator).double() for g in groups]
    apart = make_others(groups)
    # some nats a token, so that z0 is not 0
    apart_refs = [-3 - torch.rand(g.num_scored, generator=generator).double() for g in apart]
    bounds = [0, *cuts, len(groups)]
    each = beside(objective, groups, refs)
    batches = [layout(groups[a:b], Columns.join(each[a:b]), objective.reads) for a, b in pairwise(bounds)]
    others = [layout(apart[a:b], ref_columns(apart_refs[a:b])) for a, b in pairwise(bounds)]
    result = forward_backward(policy, objective, batches, dict.fromkeys(objective.also, others))
    assert policy.table.grad is not None
    return result.fetch(), policy.table.grad, policy.num_calls


@pytest.mark.share(100)
@pytest.mark.parametrize("settings", SETTINGS, ids=name)
@pytest.mark.parametrize("cuts", [[4], [1, 2, 3, 4, 5, 6, 7], [3, 4]], ids=str)
@pytest.mark.parametrize("layout", [pack, pad])
def test_the_cut_changes_nothing(settings: MethodSettings, cuts: list[int], layout) -> None:  # type: ignore[no-untyped-def]
    whole, gradient, _ = run(settings, [])
    cut, cut_gradient, _ = run(settings, cuts, layout)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-10, atol=1e-14)
    for metric, (total, count) in whole.metrics.items():
        assert cut.metrics[metric][1] == count
        assert cut.metrics[metric][0] == pytest.approx(total, rel=1e-10)


def test_only_a_statistic_over_several_micro_batches_costs_a_second_pass() -> None:
    for loss_type in ("kto_pair", "bco_pair", "aot", "aot_unpaired"):
        assert run(dpo(loss_type), [])[2] == 1
        assert run(dpo(loss_type), [4])[2] == 4
    alone = [s for s in SETTINGS if not build_objective(s).whole_step and not build_objective(s).also]
    assert len(alone) > len(SETTINGS) / 2
    for settings in alone:
        assert run(settings, [4])[2] == 2


class Marked(torch.autograd.Function):
    """The identity, whose node can be watched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


@pytest.mark.share(30)
@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_no_graph_lives_on_into_the_next_micro_batch(settings: MethodSettings) -> None:
    nodes: list[weakref.ref[Any]] = []

    class Watched(Bigram):
        def forward(self, batch: Batch) -> TokenScores:
            assert not any(node() for node in nodes)
            scored = super().forward(batch)
            logps = Marked.apply(scored.logps)  # type: ignore[no-untyped-call]
            if torch.is_grad_enabled():
                nodes.append(weakref.ref(logps.grad_fn))
            return scored._replace(logps=logps)

    objective = build_objective(settings)
    groups = make_groups(objective.rows)
    each = beside(objective, groups, [-torch.ones(g.num_scored).double() for g in groups])
    batches = [pack([g], columns, objective.reads) for g, columns in zip(groups, each, strict=True)]
    apart = [pack([g], ref_columns([-torch.ones(g.num_scored).double()])) for g in make_others(groups)]
    forward_backward(Watched(), objective, batches, dict.fromkeys(objective.also, apart))
    assert len(nodes) == len(groups)


def test_mismatched_completions_alone_are_scored_once_more() -> None:
    whole, one_by_one = run(KtoSettings(), []), run(KtoSettings(), list(range(1, 8)))
    assert (whole[2], one_by_one[2]) == (2, 16)
    z0, count = whole[0].metrics["kl"]
    assert z0 > 0 and count == 1
    assert one_by_one[0].metrics["kl"][0] == pytest.approx(z0)
    assert run(KtoSettings(kto_loss="apo_zero_unpaired"), [4])[2] == 2


def test_mismatched_completions_carry_no_gradient() -> None:
    """With a step of one undesirable row, only that row's tokens move the table."""
    policy, objective = Bigram(), build_objective(KtoSettings())
    groups = make_groups("labelled")[:2]
    batch = pack(groups[1:], ref_columns([-torch.ones(groups[1].num_scored)]))
    other = pack(make_others(groups)[1:], ref_columns([-4 * torch.ones(groups[0].num_scored)]))
    forward_backward(policy, objective, [batch], {"mismatched": [other]})
    assert policy.table.grad is not None
    met = set(batch.input_ids.flatten()[batch.scored_positions].tolist())
    assert set(policy.table.grad.abs().sum(1).nonzero().flatten().tolist()) == met


@pytest.mark.parametrize(
    "settings", [KtoSettings(), *(dpo(loss) for loss in ("kto_pair", "bco_pair", "aot", "aot_unpaired"))], ids=name
)
def test_an_evaluation_is_one_step(settings: MethodSettings) -> None:
    policy, objective = Bigram(), build_objective(settings)
    groups = make_groups(objective.rows)
    generator = torch.Generator().manual_seed(4)
    refs = [-4 * torch.rand(g.num_scored, generator=generator) for g in groups]
    others = make_others(groups)
    apart_refs = [-4 * torch.ones(g.num_scored) for g in others]
    batches = [pack([g], ref_columns([r])) for g, r in zip(groups, refs, strict=True)]
    apart = [pack([g], ref_columns([r])) for g, r in zip(others, apart_refs, strict=True)]
    also = {name: [pack(others, ref_columns(apart_refs))] for name in objective.also}
    whole = forward_backward(policy, objective, [pack(groups, ref_columns(refs))], also).fetch()
    one_by_one = evaluate(policy, objective, batches, dict.fromkeys(objective.also, apart)).fetch()
    assert one_by_one.loss == pytest.approx(whole.loss, rel=1e-12)
    # a statistic of each row alone would say something else
    alone = [
        evaluate(policy, objective, [b], dict.fromkeys(objective.also, apart[i : i + 1])).fetch().loss
        for i, b in enumerate(batches)
    ]
    assert one_by_one.loss != pytest.approx(sum(alone) / len(alone), rel=1e-4)
    if objective.also:
        assert one_by_one.metrics["kl"][1] == 1


@pytest.mark.share(40)
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.method != "grpo"], ids=name)
def test_the_gradient_of_the_weights_is_that_of_the_loss(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    groups = make_groups(objective.rows)
    refs = ref_columns([-torch.rand(g.num_scored).double() for g in groups])
    batch = pack(groups, refs, {"prompt_logps", "collisions"} | objective.reads)
    policy = Bigram()
    apart = make_others(groups)
    others = pack(apart, ref_columns([-3 - torch.rand(g.num_scored).double() for g in apart]))
    forward_backward(policy, objective, [batch], {name: [others] for name in objective.also})
    assert policy.table.grad is not None
    direction = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def scored_at(distance: float, batch: Batch) -> Scores:
        with torch.no_grad():
            moved = Bigram()
            moved.table += distance * direction
            return Scores.of(batch, moved(batch))

    def by_completion(per_token: Tensor, groups: list[Group]) -> list[list[Any]]:
        parts = iter(per_token.split([c.num_scored for g in groups for c in g.completions]))
        return [[next(parts).numpy() for _ in g.completions] for g in groups]

    def step_of(scores: Scores, groups: list[Group]) -> Step:
        sides = (by_completion(x, groups) for x in (scores.logps, scores["ref_logps"]))
        return [list(zip(*group, strict=True)) for group in zip(*sides, strict=True)]

    def loss_at(distance: float) -> float:
        scores, still = scored_at(distance, batch), scored_at(0, batch)
        prompts = [x.numpy() for x in scores["prompt_logps"].split([len(g.prompt_ids) - 1 for g in groups])]
        fixed = (step_of(still, groups), step_of(scored_at(0, others), apart))
        return step_loss(settings, step_of(scores, groups), *fixed, prompts, by_completion(still["collisions"], groups))

    eps = 1e-6
    ahead, behind = loss_at(eps), loss_at(-eps)
    along = float((policy.table.grad * direction).sum())
    assert along == pytest.approx((ahead - behind) / (2 * eps), rel=1e-6, abs=1e-7)


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    objective, groups = build_objective(SftSettings()), make_groups("single")
    batches = [pack(groups[:4]), pack(groups[4:])]

    def loss(seed: tuple[int, int]) -> float:
        policy = Bigram()
        policy.dropout.p = 0.5
        torch.rand(7)  # the global state before a step must not matter
        return forward_backward(policy, objective, batches, seed=seed).fetch().loss

    assert loss((0, 1)) == loss((0, 1))
    assert loss((0, 1)) != loss((0, 2)) != loss((1, 2))


@pytest.mark.share(20)
@pytest.mark.parametrize("cuts", [[], [3]], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=name)
def test_no_value_is_needed_during_a_step(settings: MethodSettings, cuts: list[int]) -> None:
    """On the meta device tensors have shapes and no values: whatever reads one back fails there."""
    objective, meta = build_objective(settings), torch.device("meta")
    groups = make_groups(objective.rows)
    bounds = [0, *cuts, len(groups)]

    def batches(of: list[Group], reads: frozenset[str]) -> list[Batch]:
        refs = [-torch.ones(g.num_scored) for g in of]
        each = beside(objective, of, refs) if of is groups else [ref_columns([ref]) for ref in refs]
        return [pack(of[a:b], Columns.join(each[a:b]), reads).to(meta) for a, b in pairwise(bounds)]

    also = {name: batches(make_others(groups), frozenset()) for name in objective.also}
    result = forward_backward(
        Bigram().to(meta), objective, batches(groups, objective.reads), also, scale=torch.ones(())
    )
    assert result.terms.keys() == objective.units.keys()
    with pytest.raises(NotImplementedError, match="meta"):
        result.fetch()


def test_numbers_are_fetched_as_they_are() -> None:
    found = run(KtoSettings(), [])[0]
    total, count = found.metrics["rewards/chosen"]
    assert isinstance(total, float) and isinstance(count, int) and count == 4
    result = forward_backward(Bigram(), build_objective(dpo()), [pack(g := make_groups("pair"), ones(g))])
    numbers = result.fetch(norm=torch.tensor(0.1))
    assert torch.equal(numbers.more["norm"], torch.tensor(0.1))
    assert numbers.margins is not None and result.margins is not None and torch.equal(numbers.margins, result.margins)
    assert numbers.loss == float(result.terms["preference"])


def ones(groups: list[Group]) -> Columns:
    return ref_columns([-torch.ones(g.num_scored).double() for g in groups])


@pytest.mark.parametrize("column", ["log-probs", "ref_logps", "rewards"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_the_rows_with_numbers_that_are_not_finite_are_named(column: str, value: float) -> None:
    groups = make_groups("group" if column == "rewards" else "pair")
    refs = [-torch.ones(g.num_scored).double() for g in groups]
    logps = [-torch.ones(g.num_scored).double() for g in groups]
    for i in (2, 5):
        match column:
            case "log-probs":
                logps[i][-1] = value
            case "ref_logps":
                refs[i][0] = value
            case _:
                groups[i].numbers["rewards"][0] = value
    assert suspect_rows(scores_of(groups, logps, refs), groups) == "rows:3, rows:6"


def test_the_rows_of_the_step_are_named_where_all_numbers_are_finite() -> None:
    groups = make_groups("pair")
    finite = [-torch.ones(g.num_scored).double() for g in groups]
    assert suspect_rows(scores_of(groups, finite, finite), groups, most=2) == "rows:1, rows:2 and 6 more"


def scores_of(groups: list[Group], logps: list[Tensor], refs: list[Tensor]) -> StepScores:
    """Of a step of one micro-batch."""
    return StepScores(Scores.of(pack(groups, ref_columns(refs)), TokenScores(torch.cat(logps))), {}, {}, None)
