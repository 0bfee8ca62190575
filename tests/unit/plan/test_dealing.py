"""Groups are dealt to processes once each, and no process works much longer than the others."""

from __future__ import annotations

import numpy as np
from benchmarks.dealing import idle_share
from hypothesis import given
from hypothesis import strategies as st

from strop.lengths import Lengths
from strop.plan.dealing import GroupCost, deal
from strop.plan.row_tokens import packed_tokens
from strop.types import GroupLengths

COSTS = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


@given(COSTS, st.integers(1, 9))
def test_every_group_is_dealt_once_and_the_loads_are_close(costs: list[int], size: int) -> None:
    """No process has more than the mean and the largest group: 4/3 of the best deal at most (Graham 1969)."""
    shares = deal(np.array(costs, float), size)
    assert len(shares) == size
    assert sorted(group for share in shares for group in share) == list(range(len(costs)))
    loads = [sum(costs[g] for g in share) for share in shares]
    assert max(loads) <= sum(costs) / size + max(costs) * (1 - 1 / size) + 1e-9
    if len(costs) >= size:
        assert all(shares), "nobody is idle while another has two"
    assert shares == deal(np.array(costs, float), size), "the same in every process"


def test_the_cost_of_a_group() -> None:
    """Keys that are seen: a prompt sees half of itself, completions see the prompt and half of themselves."""
    lengths = Lengths.of([GroupLengths(100, (10, 20)), GroupLengths(4, (2,))])
    tokens = packed_tokens.of_each(lengths)
    seen = np.array([5000 + 100 * 30 + (100 + 400) / 2, 8 + 8 + 2])
    assert np.allclose(GroupCost().of_each(lengths, packed_tokens), tokens)
    assert np.allclose(GroupCost(0.5, 2.0).of_each(lengths, packed_tokens), tokens + 0.5 * seen + 2 * np.array([30, 2]))


def test_idle_time() -> None:
    assert idle_share(np.array([[1.0, 1.0], [2.0, 2.0]])) == 0
    assert idle_share(np.array([[4.0, 2.0], [4.0, 2.0]])) == 0.25
