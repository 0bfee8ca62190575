"""The plan is a pure function of seed and step, and cutting loses nothing."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.lengths import Lengths
from strop.plan import cutting
from strop.plan.cutting import OPEN, cut, cut_steps
from strop.plan.micro_batch_size import default_budget
from strop.plan.order import Plan
from strop.plan.packing import filled_rows
from strop.plan.row_tokens import packed_tokens, padded_tokens
from strop.plan.work import EpochWork, Work
from strop.types import Completion, Group, Origin

plans = st.builds(
    Plan.of, st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.none() | st.integers(1, 12), st.integers(0, 9)
)


@given(plans)
def test_an_epoch_meets_every_group_once(plan: Plan) -> None:
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
        met = [i for s in steps for i in plan.groups(s)]
        assert sorted(met) == list(range(plan.num_groups))
        assert all(len(plan.groups(s)) == plan.groups_per_step for s in list(steps)[:-1])


@given(plans)
def test_positions_count_epochs_and_steps_from_zero(plan: Plan) -> None:
    assert plan.position(1) == (0, 0)
    assert plan.position(plan.steps_per_epoch + 1) == (1, 0)


@given(plans)
def test_all_groups_is_what_the_steps_meet(plan: Plan) -> None:
    assert list(plan.all_groups()) == sorted({i for s in range(1, plan.num_steps + 1) for i in plan.groups(s)})


def test_epochs_and_seeds_differ() -> None:
    plan = Plan.of(32, 32, 2, None, 0)
    assert plan.groups(1) != plan.groups(2)
    assert plan.groups(1) != Plan.of(32, 32, 2, None, 1).groups(1)
    assert plan.groups(1) == Plan.of(32, 32, 5, None, 0).groups(1)


@given(plans)
def test_an_epoch_is_its_steps_one_behind_the_other(plan: Plan) -> None:
    order, starts = plan.epoch(1)
    steps = range(plan.steps_per_epoch + 1, 2 * plan.steps_per_epoch + 1)
    assert [tuple(order[a:b].tolist()) for a, b in pairwise(starts)] == [plan.groups(step) for step in steps]
    assert plan.all_visits().tolist() == [visit for step in range(1, plan.num_steps + 1) for visit in plan.visits(step)]


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(lengths, st.integers(1, 60), st.booleans())
def test_cutting_keeps_groups_and_budget(sizes: list[tuple[int, int, int]], budget: int, packed: bool) -> None:
    tokens = packed_tokens if packed else padded_tokens
    groups = [_group(*s) for s in sizes]
    parts = cut(groups, range(len(groups)), budget, tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(groups)))
    assert all(len(part) == 1 or tokens([groups[i] for i in part]) <= budget for part in parts)
    whole = default_budget(groups, len(groups), tokens, "cuda")
    assert len(cut(groups, range(len(groups)), whole, tokens)) == 1, "a batch of that many groups must fit"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=OPEN), st.integers(1, 60))
def test_a_step_of_shared_rows_is_cut_into_filled_micro_batches(sizes: list[tuple[int, int]], budget: int) -> None:
    groups = [_group(*s) for s in sizes]
    fed = sorted(
        packed_tokens([groups[i] for i in part]) for part in cut(groups, range(len(groups)), budget, packed_tokens)
    )
    assert len(fed) == 1 or fed[0] + fed[1] > budget, "two micro-batches would fit into one"


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(40, 200))
def test_padded_micro_batches_hold_alike_lengths(sizes: list[int], budget: int) -> None:
    """As good as cutting the groups one after the other, sorted by length."""
    groups = [_group(size, 1) for size in sizes]
    parts = cut(groups, range(len(groups)), budget, padded_tokens)
    found = [sorted((sizes[i] for i in part), reverse=True) for part in parts]
    assert [size for part in found for size in part] == sorted(sizes, reverse=True)
    assert all(len(a) * a[0] + a[0] > budget for a in found[:-1]), "one more would have fitted"


@pytest.mark.parametrize(
    ("longest", "batch_size", "on_cpu"), [(100, 4, 2048), (600, 1, 2048), (600, 4, 2048), (3000, 4, 3000)]
)
def test_the_default_budget_by_device(longest: int, batch_size: int, on_cpu: int) -> None:
    groups = [_group(longest - 4, 3, 3), _group(5, 3)]
    assert default_budget(groups, batch_size, packed_tokens, "cuda") == batch_size * longest
    assert default_budget(groups, batch_size, packed_tokens, "cpu") == on_cpu


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_lengths_come_some_at_a_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in their order; the longest is found wherever it is."""
    listed = [_group(2 + i % 5, *range(1, 2 + i % 4)) for i in range(7)]
    whole = Lengths.of(listed)
    longest = [default_budget(whole, 1, tokens, "cuda") for tokens in (packed_tokens, padded_tokens)]
    monkeypatch.setattr("strop.lengths.CHUNK", chunk)
    assert [one for some in whole.chunks() for one in some] == list(whole)
    assert all(len(some) <= chunk for some in whole.chunks())
    assert [default_budget(whole, 1, tokens, "cuda") for tokens in (packed_tokens, padded_tokens)] == longest


def test_rows_without_a_limit_are_one() -> None:
    groups = [_group(3, 2), _group(5, 4), _group(1, 1)]
    assert filled_rows(groups, 10**15, 0) == filled_rows(groups, sum(g.num_tokens for g in groups), 0)
    assert len(filled_rows(groups, 10**15, 0)) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1), st.integers(17, 60), st.integers(0, 3))
def test_b12_filled_rows_hold_every_group_once_and_no_two_of_them_fit_into_one(
    sizes: list[tuple[int, int]], max_tokens: int, seed: int
) -> None:
    groups = [_group(*s) for s in sizes]
    rows = filled_rows(groups, max_tokens, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(groups)))
    filled = sorted(sum(groups[i].num_tokens for i in row) for row in rows)
    assert filled[-1] <= max_tokens and (len(filled) == 1 or filled[0] + filled[1] > max_tokens)
    assert rows == filled_rows(groups, max_tokens, seed)
    plan = Plan.of(len(groups), 2, 2, None, seed, rows)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
        assert sorted(i for s in steps for i in plan.groups(s)) == list(range(len(groups)))
    assert plan.num_steps == 2 * -(-len(rows) // 2)


ragged = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=8)), min_size=1, max_size=40
)


@given(ragged, st.integers(1, 9), st.integers(1, 90), st.booleans(), st.booleans(), st.sampled_from([0, 99]))
def test_an_epoch_is_cut_as_its_steps_are(
    sizes: list[tuple[int, list[int]]], groups_per_step: int, budget: int, packed: bool, filled: bool, few: int
) -> None:
    """Whether steps are cut together or one by one, some at a time or all; and its numbers are those of its parts."""
    tokens = packed_tokens if packed else padded_tokens
    groups = [_group(prompt, *answers) for prompt, answers in sizes]
    own = Lengths.of(groups)
    rows = filled_rows(groups, 40, 0) if filled else None
    plan = Plan.of(len(groups), groups_per_step, 1, None, 0, rows)
    found: list[list[list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "FEW", few)
        patch.setattr(cutting, "TOGETHER", 12)
        for numbers, starts, num_parts in cut_steps(own, *plan.epoch(0), budget, tokens):
            parts = iter([numbers[a:b].tolist() for a, b in pairwise(starts)])
            found += [[next(parts) for _ in range(n)] for n in num_parts.tolist()]
        epoch = EpochWork.of(plan, own, budget, tokens, prompts=False)
    expected = [cut(groups, plan.groups(step), budget, tokens) for step in range(1, plan.steps_per_epoch + 1)]
    assert found == expected
    assert np.diff(epoch.starts).tolist() == [len(parts) for parts in expected]
    each = Work.joined(Work.of([groups[i] for i in part], tokens) for parts in expected for part in parts)
    assert each.tokens.tolist() == [tokens([groups[i] for i in part]) for parts in expected for part in parts]
    for name in vars(each):
        assert getattr(epoch.work, name).tolist() == getattr(each, name).tolist()
    rows_of = {tuple(float(getattr(each, name)[n]) for name in vars(each)) for n in range(len(each))}
    assert len(each.distinct()) == len(rows_of)


def test_the_work_of_a_group_of_three() -> None:
    """By hand: a prompt of 5 tokens; answers of 2, 3 and 4, whose last tokens are fed to nothing."""
    work = Work.of([_group(5, 2, 3, 4)], packed_tokens, prompts=True)
    plain = Work.of([_group(5, 2, 3, 4)], padded_tokens)
    assert work.tokens == 5 + 1 + 2 + 3 and plain.tokens == 3 * (5 + 3)
    assert work.again == 2 * 5 and work.scored == 9 + 4 and plain.scored == 9
    assert work.seen == 12.5 + (10 + 2) + (15 + 4.5) + (20 + 8)
    assert work.squares == 11**2 and plain.squares == 24**2


def test_many_long_rows_are_filled_in_time_that_grows_with_their_number() -> None:
    """Where a row may be as long as all groups together, the search for room once took time per token of it."""
    started = time.process_time()
    own = Lengths(np.full(20_000, 10**4), np.ones(20_000, int), np.arange(20_001))
    assert len(filled_rows(own, 10**15, 0)) == 1
    assert time.process_time() - started < 5


def _group(prompt: int, *answers: int) -> Group:
    return Group(
        array("i", [1] * prompt), tuple(Completion(array("i", [2] * n), b"\1" * n) for n in answers), Origin("rows", 1)
    )


@pytest.mark.parametrize(("size", "passes"), [(1, 3), (2, 1), (2, 2), (3, 2), (9, 2)])
def test_rounds_go_through_their_steps_again(size: int, passes: int) -> None:
    """In the order of a plan without rounds; every epoch meets every group as often as its rounds are gone through."""
    plain = Plan.of(10, 3, 2, None, 7)
    plan = Plan.of(10, 3, 2, None, 7, steps_per_round=size, passes_per_round=passes)
    assert plan.num_steps == passes * plain.num_steps and plan.num_epochs == 2
    seen: list[tuple[int, ...]] = []
    for step in range(1, plan.num_steps + 1):
        steps, first = plan.round(step), plan.first_time(step)
        assert first in steps and steps.start <= step < steps.start + len(steps) * passes
        assert plan.groups(step) == plan.groups(first) and plan.position(step)[0] == plan.position(first)[0]
        if step == first:
            seen.append(plan.groups(step))
    assert seen == [plain.groups(step) for step in range(1, plain.num_steps + 1)]
    counted = Counter(number for step in range(1, plan.steps_per_epoch + 1) for number in plan.groups(step))
    assert counted == dict.fromkeys(range(10), passes)
