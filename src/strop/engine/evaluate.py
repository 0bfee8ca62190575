"""Loss and metrics on the validation groups: one evaluation counts as one step. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from strop.batch import Batch, Scores
from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.engine.memory import cut_finer, does_not_fit
from strop.engine.source import Cut, GroupSet, batches_of, further_batches
from strop.engine.step import Forward, StepScores, summarise
from strop.objectives.base import Objective
from strop.policy.memory import attempt
from strop.policy.policy import Policy


def evaluate(
    policy: Forward,
    objective: Objective[MethodSettings],
    batches: Iterable[Batch],
    also: Mapping[str, Iterable[Batch]] | None = None,
    done: Callable[[int], None] = lambda num_groups: None,
) -> StepScores:
    """Score `batches` without gradients (the caller switches dropout off) and sum over all of them at once.

    Args:
        also: the micro-batches of the further groups that the objective reads, by name.
        done: called with the number of groups of each micro-batch as it is scored.
    """
    parts = []
    with torch.no_grad():
        apart = {name: [Scores.of(b, policy(b)) for b in micro_batches] for name, micro_batches in (also or {}).items()}
        others = {name: Scores.join(scored) for name, scored in apart.items()}
        for batch in batches:
            parts.append(Scores.of(batch, policy(batch), others))
            done(batch.structure.num_groups)
    return summarise(objective, Scores.join(parts))


class Watcher(Protocol):
    """Who is told how far an evaluation is."""

    def evaluating(self, num_groups: int) -> AbstractContextManager[Callable[[int], None]]: ...
    def note(self, text: str) -> None: ...


class _StoppedError(Exception):
    """A signal came in the middle of an evaluation."""


class Evaluation:
    """Evaluates a policy on one set of groups, as often as it is asked to.

    Args:
        cut: how the groups come in micro-batches; a finer one from the first time on that memory runs out.
        should_stop: asked before each micro-batch; where it says so, the evaluation ends without a result.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        objective: Objective[MethodSettings],
        groups: GroupSet,
        cut: Cut,
        watcher: Watcher,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.policy, self.objective = config, policy, objective
        self.groups, self.cut, self.watcher, self.should_stop = groups, cut, watcher, should_stop

    def scores(self, where: str) -> StepScores | None:
        """The scores of all groups with the weights as they are; None: stopped. where: how messages name the time.

        Raises:
            TrainingError: micro-batches of one group each do not fit into memory.
        """
        while True:
            try:
                found, why = attempt(self._score)
            except _StoppedError:
                return None
            if found is not None:
                return found
            finer = self.cut.smaller(self.groups)
            if finer is None:
                longest = max(self.groups.lengths, key=lambda group: group.num_tokens)
                raise does_not_fit(self.config, why, where, longest.num_tokens)
            self.watcher.note(cut_finer(where, why, self.cut.budget_tokens, finer.budget_tokens))
            self.cut = finer

    def _score(self) -> StepScores:
        groups, policy = self.groups, self.policy
        with policy.scoring(), self.watcher.evaluating(len(groups.groups)) as done:
            batches = self._until_stopped(batches_of(groups, policy, self.cut.parts(groups)))
            further = further_batches(groups, policy, self.cut)
            also = {name: self._until_stopped(of) for name, of in further.items()}
            return evaluate(policy, self.objective, batches, also, done)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """An evaluation can be long, and nothing of it is lost but itself."""
        for batch in batches:
            if self.should_stop():
                raise _StoppedError
            yield batch
