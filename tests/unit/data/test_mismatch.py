"""Mismatched completions: never the row's own, each taken once, drawn anew each epoch, within the limit."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.data.mismatch import Mismatched, partners
from strop.data.store.table import Groups
from strop.lengths import Keys, keys_of
from strop.plan.order import Plan
from strop.types import Completion, Group, Origin

prompts = st.lists(st.integers(0, 5), min_size=2, max_size=30).map(
    lambda xs: np.unique(np.array(xs), return_inverse=True)[1]
)


@given(prompts, st.integers(0, 99), st.integers(0, 5))
def test_a_partner_is_another_row_and_of_another_prompt_where_there_can_be(found, seed: int, epoch: int) -> None:  # type: ignore[no-untyped-def]
    partner = partners(found, seed, epoch)
    assert sorted(partner) == list(range(len(found))), "each completion is taken once"
    assert not (partner == np.arange(len(found))).any()
    if 2 * np.bincount(found).max() <= len(found):
        assert (found[partner] != found).all()


def test_epochs_and_seeds_draw_anew() -> None:
    alone = np.arange(50)
    draws = [partners(alone, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(d) for d in draws}) == 4
    assert draws[0] == partners(alone, 0, 0).tolist()
    # a partner is any other row, not a neighbour: over many epochs everything is met
    assert {int(partners(np.arange(4), 0, epoch)[0]) for epoch in range(40)} == {1, 2, 3}


def group(i: int, prompt: int = 3, completion: int = 2) -> Group:
    return Group(
        array("i", [100 * i + j for j in range(prompt)]),
        (Completion(array("i", [i] * completion), b"\1" * completion),),
        Origin("rows", i + 1),
        label=True,
    )


@pytest.mark.parametrize("num_rows", [2, 3, 8])
def test_visits_count_over_epochs(num_rows: int) -> None:
    groups = [group(i) for i in range(num_rows)]
    plan = Plan.of(num_rows, 3, 3, None, 7)
    found = Mismatched(groups, num_epochs=plan.num_epochs, seed=7, max_tokens=64)
    assert len(found) == 3 * num_rows and sorted(plan.all_visits().tolist()) == list(range(len(found)))
    for step in range(1, plan.num_steps + 1):
        for visit, row in zip(plan.visits(step), plan.groups(step), strict=True):
            assert found[visit].prompt_ids == groups[row].prompt_ids
            assert found[visit].completions != groups[row].completions
            assert found[visit].label is None
    assert list(found[0:2]) == [found[0], found[1]]
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("max_tokens", [64, 8])
def test_lengths_and_keys_are_known_without_reading(
    max_tokens: int, on_disk: Callable[..., Groups], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the groups themselves; of many prompts that give way only these are read."""
    listed = [group(i % 7, prompt=1 + i % 5, completion=1 + i % 6) for i in range(12)]
    stored, num_epochs = on_disk(listed), 3
    expected = list(Mismatched(listed, num_epochs=num_epochs, seed=1, max_tokens=max_tokens))
    num_read = 0
    get = Groups.__getitem__

    def counted(self: Groups, index: int) -> Group:
        nonlocal num_read
        num_read += 1
        return get(self, index)

    monkeypatch.setattr(Groups, "__getitem__", counted)
    found = Mismatched(stored, num_epochs=num_epochs, seed=1, max_tokens=max_tokens)
    assert list(found.lengths) == [g.lengths for g in expected]
    assert num_read == 0
    numbers = np.arange(len(found))[::-1]
    known, alone = keys_of(found, numbers), Keys.of(expected[i] for i in numbers)
    given_way = sum(len(g.prompt_ids) < len(listed[i % 12].prompt_ids) for i, g in enumerate(expected))
    assert num_read == 2 * given_way and bool(given_way) == (max_tokens == 8)
    assert list(known.lengths) == list(alone.lengths)
    for name in ("scored", "prompts", "completions"):
        assert getattr(known, name).tolist() == getattr(alone, name).tolist(), name
    monkeypatch.undo()
    assert list(found) == expected


def test_the_prompt_gives_way_at_the_left() -> None:
    short, long = group(0, prompt=9, completion=1), group(1, prompt=1, completion=9)
    found = Mismatched([short, long], num_epochs=1, seed=0, max_tokens=10)
    assert list(found[0].prompt_ids) == [8] and len(found[0].completions[0].ids) == 9
    assert found[1].prompt_ids == long.prompt_ids
