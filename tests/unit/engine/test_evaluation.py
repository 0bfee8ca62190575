"""An evaluation that is stopped has no result, in any of the processes that share it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from strop.batch import Batch, TokenScores, pack
from strop.columns import Columns
from strop.config import RunConfig
from strop.config.methods import SftSettings
from strop.engine.step_source import Cut, GroupSet
from strop.engine.validation import AGREED_EVERY, Validation
from strop.objectives.base import build_objective
from strop.plan.row_tokens import packed_tokens
from strop.types import Completion, Group, Origin
from strop.world import World
from worlds import in_worlds, replicated

GROUPS = [Group(array("i", [1]), (Completion(array("i", [2]), b"\1"),), Origin("rows", i)) for i in range(60)]


class Scoring:
    """A policy that counts the micro-batches that it scores."""

    def __init__(self, world: World) -> None:
        self.num_scored, self.strategy = 0, replicated({}, world)

    def scoring(self) -> AbstractContextManager[None]:
        return nullcontext()

    def collate(self, groups: Sequence[Group], columns: Columns, wants: frozenset[str]) -> Batch:
        return pack(groups, columns, wants)

    def __call__(self, batch: Batch) -> TokenScores:
        self.num_scored += 1
        return batch.token_scores(torch.zeros(len(batch.targets)))


class Watching:
    @contextmanager
    def evaluating(self, num_groups: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def note(self, text: str) -> None:
        raise AssertionError(text)


def evaluated(world: World, stops_rank: int | None, after: int = 0) -> tuple[bool, int, int]:
    """Whether there is a result, how many micro-batches this process scored, and how often it asked whether to stop.

    stops_rank: the process that a signal stops. after: how many micro-batches that process has scored by then.
    """
    policy: Any = Scoring(world)
    num_asked = 0

    def should_stop() -> bool:
        nonlocal num_asked
        num_asked += 1
        return world.any(world.rank == stops_rank and policy.num_scored >= after)

    objective = build_objective(SftSettings())
    parts = (RunConfig(models=[{"huggingface_id": "model"}]), policy, objective, GroupSet(GROUPS))  # type: ignore[list-item]
    cut = Cut(1, packed_tokens)  # every group is a micro-batch
    scores = Validation(*parts, cut, Watching(), world, should_stop).scores("evaluation")
    return scores is not None, policy.num_scored, num_asked


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_seldom_wait_for_each_other(size: int) -> None:
    """One process asks before each micro-batch; several, which have to agree, before every few."""
    most = -(-len(GROUPS) // size)
    for found, num_scored, num_asked in in_worlds(size, lambda world: evaluated(world, None)):
        assert found and most - 1 <= num_scored <= most
        assert num_asked == (len(GROUPS) if size == 1 else -(-most // AGREED_EVERY))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_process_that_is_to_stop_stops_all_soon(size: int) -> None:
    after = AGREED_EVERY + 1
    for found, num_scored, _ in in_worlds(size, lambda world: evaluated(world, size - 1, after)):
        assert not found
        assert num_scored == (after if size == 1 else 2 * AGREED_EVERY)
