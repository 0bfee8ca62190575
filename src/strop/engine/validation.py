"""Loss and metrics on the validation groups: one evaluation counts as one step. Floor 3.

An `Evaluator` measures the policy between two steps. `Validation` scores groups that are there; a step source may bring
another one (`StepSource.evaluator`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strop.batch import Batch, Scores
from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.engine.evaluation_contract import Watcher
from strop.engine.out_of_memory import attempt_together, cut_finer, does_not_fit
from strop.engine.row_losses import row_losses
from strop.engine.step import ALONE, Forward, StepScores, join_all, summarise
from strop.engine.step_source import Cut, GroupSet
from strop.objectives.base import Objective
from strop.policy.policy import Policy
from strop.world import World


def evaluate(
    policy: Forward,
    objective: Objective[MethodSettings],
    batches: Iterable[Batch],
    also: Mapping[str, Iterable[Batch]] | None = None,
    done: Callable[[int], None] = lambda num_groups: None,
    world: World = ALONE,
) -> StepScores:
    """Scores `batches` without gradients and summarises them as one. The caller switches dropout off.

    Args:
        also: the micro-batches of further groups that the objective reads, by name.
        done: called after each micro-batch with its number of groups.
        world: the processes that share the evaluation; `batches` are those of this one. All get the same result.
    """
    parts = []
    with torch.no_grad():
        apart = {name: [Scores.of(b, policy(b)) for b in micro_batches] for name, micro_batches in (also or {}).items()}
        others = {name: join_all(scored, world) for name, scored in sorted(apart.items())}
        for batch in batches:
            parts.append(Scores.of(batch, policy(batch), others))
            done(batch.structure.num_groups)
    return summarise(objective, join_all(parts, world, others))


AGREED_EVERY = 8
"""After how many micro-batches several processes agree again on whether to stop. They wait for each other each time."""


class _StoppedError(Exception):
    """A signal stopped an evaluation before its end."""


class Validation:
    """Evaluates a policy on one set of groups, repeatedly.

    Args:
        cut: how the groups are first cut into micro-batches. If memory runs out, they become smaller for good.
        should_stop: whether to end the evaluation without a result. All processes call it together, so it is called
            before every micro-batch only if there is one process, else before each `AGREED_EVERY`-th.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        objective: Objective[MethodSettings],
        groups: GroupSet,
        cut: Cut,
        watcher: Watcher,
        world: World,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.policy, self.objective = config, policy, objective
        self.groups, self.cut, self.watcher = groups, cut, watcher
        self.world, self.should_stop = world, should_stop
        self.names = objective.evaluated
        self.row_losses: NDArray[np.float64] | None = None

    def line(self, where: str) -> Mapping[str, Any] | None:
        """Loss, terms and metrics over all groups, as `Evaluator.line`."""
        started = time.perf_counter()
        result = self.scores(where)
        if result is None:
            return None
        numbers = self.world.on_main(result.fetch)  # the last bits may depend on the machine
        if self.world.is_main:
            self.row_losses = row_losses(self.objective, result.scores, self.order)
        return {
            "loss": numbers.loss,
            **({f"loss/{t}": share for t, share in numbers.terms.items()} if len(numbers.terms) > 1 else {}),
            "num_groups": result.scores.structure.num_groups,
            "num_scored_tokens": result.scores.structure.num_tokens,
            "seconds": time.perf_counter() - started,
            **{name: total / count for name, (total, count) in numbers.metrics.items() if count},
        }

    @property
    def order(self) -> list[int]:
        """For each group of the last scores, its place among the groups."""
        shares = self.cut.shares(self.groups, self.world.size)
        return [place for share in shares for part in share for place in part]

    def scores(self, where: str) -> StepScores | None:
        """The scores of all groups with the current weights; None if it was stopped.

        Args:
            where: how messages name this evaluation.

        Raises:
            TrainingError: micro-batches of one group each do not fit into memory.
        """
        while True:
            try:
                found, why = attempt_together(self._score, self.policy.strategy)
            except _StoppedError:
                return None
            if found is not None:
                return found
            finer = self.cut.smaller(self.groups, self.world.size) if self.policy.strategy.repeats else None
            if finer is None:
                longest = max(self.groups.lengths, key=lambda group: group.num_tokens)
                raise does_not_fit(self.config, why, where, longest.num_tokens)
            self.watcher.note(cut_finer(where, why, self.cut.budget_tokens, finer.budget_tokens))
            self.cut = finer

    def _score(self) -> StepScores:
        groups = self.groups.derived(self.objective)
        with self.policy.scoring(), self.watcher.evaluating(len(groups.groups)) as done:
            batches = self._until_stopped(groups)
            also = {name: self._until_stopped(some) for name, some in groups.also.items()}
            return evaluate(self.policy, self.objective, batches, also, done, self.world)

    def _until_stopped(self, groups: GroupSet) -> Iterator[Batch]:
        """The micro-batches of this process. It asks meanwhile whether to stop: an evaluation can be long, and stopping
        it loses nothing else."""
        shares = self.cut.shares(groups, self.world.size)
        own = shares[self.world.rank]
        every = 1 if self.world.size == 1 else AGREED_EVERY
        for at in range(max(map(len, shares))):
            if at % every == 0 and self.should_stop():
                raise _StoppedError
            if at < len(own):
                yield groups.batch(self.policy, own[at])
            else:
                self.policy.strategy.idle(False, groups.wants)
