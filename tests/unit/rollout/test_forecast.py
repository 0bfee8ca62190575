"""The forecast of groups without signal."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import combinations, product
from math import prod
from typing import Any

import numpy as np
import pytest

from conftest import build_tokenizer
from strop.data.store.table import KeptRow
from strop.engine.step_source import Cut
from strop.plan.order import Plan
from strop.plan.row_tokens import packed_tokens
from strop.rollout.collect import Collector
from strop.rollout.forecast import FEWEST, MOST, STEP, Forecast, Probe, num_probed, without_signal
from strop.rollout.rewarding import Scored
from strop.rollout.sampler import Prompt, Sampled
from strop.types import Completion, Group, Origin
from strop.world import World
from worlds import in_worlds

PROBS = {0.0: 0.55, 0.5: 0.25, 1.0: 0.2}


@pytest.mark.parametrize(("k", "size"), [(2, 2), (4, 2), (5, 3), (5, 5)])
def test_the_estimate_is_unbiased(k: int, size: int) -> None:
    """Its mean over all that can be sampled is the chance that a group of so many has no signal."""
    mean = sum(without_signal(r, size) * prod(PROBS[x] for x in r) for r in product(PROBS, repeat=k))
    assert mean == pytest.approx(sum(p**size for p in PROBS.values()), rel=1e-12)


@pytest.mark.parametrize("rewards", [[0, 0, 1, 0, 1, 0], [2.5, 2.5, 2.5], [1, 2, 3, 4]])
def test_it_is_the_share_of_all_groups_that_can_be_taken(rewards: Sequence[float]) -> None:
    for size in range(1, len(rewards) + 1):
        taken = [len(set(some)) == 1 for some in combinations(rewards, size)]
        assert without_signal(rewards, size) == pytest.approx(np.mean(taken))
    with pytest.raises(ValueError, match="say nothing"):
        without_signal(rewards, len(rewards) + 1)


def test_it_says_which_groups_have_no_signal_and_what_helps() -> None:
    dead, alive, solved = [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [1.0] * 4
    found = Forecast.of([dead] * 5 + [alive] * 4 + [solved], num_left_out=2)
    assert (found.without_signal, found.all_lowest, found.all_highest) == pytest.approx((0.6, 0.5, 0.1))
    assert found.with_half == pytest.approx(0.6 + 0.4 * 0.5), "three of the six pairs of [0, 1, 0, 0] are alike"
    assert 0 < found.low < 0.6 < found.high < 1
    what, remedy = found.lines(draws_others=False)
    assert "60%" in what and "2 others were left out" in what and "easier prompts" in remedy
    assert "rollout.num_generations (at 2 it is 80%)" in remedy and "dynamic_sampling" in remedy
    assert "dynamic_sampling" not in " ".join(found.lines(draws_others=True))
    easy = " ".join(Forecast.of([solved] * 3 + [dead]).lines(draws_others=False))
    assert "harder prompts" in easy
    assert len([*Forecast.of([alive] * 3 + [dead]).lines(draws_others=False)]) == 1, "no remedy where none is needed"
    never = Forecast.of([dead] * 3)
    assert never.without_signal == never.high == 1 and "whether the rewards apply" in " ".join(
        never.lines(draws_others=True)
    )
    assert (never.all_lowest, never.all_highest) == (0, 0)
    assert Forecast.of([[0.1, 0.2], [0.3, 0.3]]).with_half is None, "one completion is compared with none"


def test_it_costs_at_most_two_percent_of_a_run_unless_more_is_asked_for() -> None:
    plan = Plan.of(10_000, 8, 1, None, 0)
    assert num_probed(None, plan, 10_000) == MOST
    assert num_probed(0, plan, 10_000) == 0 and num_probed(5, plan, 3) == 3
    for steps in (1, 10, 99, 100, 200, 300, 1000):
        found = num_probed(None, Plan.of(10_000, 8, 1, steps, 0), 10_000)
        assert found == 0 or FEWEST <= found <= 0.02 * 8 * steps
    assert num_probed(None, Plan.of(10_000, 8, 1, 100, 0), 10_000) == 16
    assert num_probed(None, Plan.of(10_000, 8, 1, 100, 0, steps_per_round=2, passes_per_round=2), 10_000) == 0, (
        "half as many are sampled"
    )


class Prompts(list[Group]):
    @property
    def rooms(self) -> np.ndarray:
        return np.full(len(self), 8)

    def kept(self, number: int) -> KeptRow:
        return KeptRow({}, None)


def test_processes_share_it_and_forecast_the_same() -> None:
    asked = []

    class Sampling:
        def prepare(self) -> Callable[[], None]:
            return lambda: None

        def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
            asked.extend((step, p.number) for p in prompts)
            return [[Sampled(array("i", [p.number % 7, 1 + g]), array("d", [-1, -1]), True) for g in (0, 1)]
                    for p in prompts]  # fmt: skip

    class Scoring:
        names, normalises = ("a",), False

        def score(self, prompt: str, texts: Any, lengths: Any, row: Any, origin: Origin, failures: Any) -> Any:
            if origin.line == 3:
                return None
            values = (0.0, float(origin.line % 3 == 0))
            return Scored(values, {"a": values})

    rows = Prompts(Group(array("i", [5]), (Completion(array("i", [3]), b"\1"),), Origin("rows", i)) for i in range(60))

    def told(world: World) -> Any:
        parts: Any = (rows, Sampling(), Scoring(), build_tokenizer(), world, Cut(10, packed_tokens))
        probe, done = Probe.of(Collector(*parts), 40, 7), []
        found = probe.run(done.append, lambda: False)
        assert sum(done) == 40 and probe.run(done.append, lambda: True) is None
        return found, list(probe.numbers)

    results = [result for size in (1, 2, 3) for result in in_worlds(size, told)]
    assert all(result == results[0] for result in results)
    found, numbers = results[0]
    assert len(set(numbers)) == 40 and set(asked) == {(STEP, n) for n in numbers}
    kept = [n for n in numbers if n != 3]
    assert (found.num_prompts, found.num_left_out) == (len(kept), 40 - len(kept))
    assert found.without_signal == pytest.approx(np.mean([n % 3 > 0 for n in kept]))
