"""The step source of offline training: groups from files in the order of a plan, with reference log-probs. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from strop.columns import Columns
from strop.engine.evaluation_contract import Evaluator, Watcher
from strop.engine.step_source import GroupSet, Part, Supply
from strop.objectives.base import FetchedMean
from strop.plan.order import Plan
from strop.policy.reference_models import SyncedReference


class OfflineSource:
    """A `StepSource` whose groups are all known before the first step.

    Args:
        train: all training groups. Their further groups (`also`) are indexed by visit (`Plan.visits`).
        following: a reference that follows the policy and scores every step, instead of stored log-probs.
    """

    def __init__(
        self, plan: Plan, train: GroupSet, validation: GroupSet | None, following: SyncedReference | None = None
    ) -> None:
        self.plan, self.train, self.following = plan, train, following
        self.num_steps, self.ahead = plan.num_steps, following is None
        self.validation = validation and self._followed(validation)
        self.supplies, self.also = self._followed(train).supplies, frozenset(train.also)

    def step(self, step: int) -> GroupSet:
        taken = _take(self.train, self.plan.groups(step))
        also = {name: _take(others, self.plan.visits(step)) for name, others in self.train.also.items()}
        return self._followed(replace(taken, also=also))

    def place(self, step: int) -> tuple[int, int]:
        return self.plan.position(step)

    def metrics(self, step: int) -> Mapping[str, FetchedMean]:
        return {}

    def evaluator(self, watcher: Watcher, should_stop: Callable[[], bool]) -> Evaluator | None:
        return None

    def epochs(self, step: int) -> float:
        return step / self.plan.steps_per_epoch

    def after(self, step: int) -> None:
        if self.following is not None:
            self.following.after(step)

    def tensors(self) -> Mapping[str, Tensor]:
        weights = {} if self.following is None else self.following.weights
        return {f"reference.{name}": tensor for name, tensor in weights.items()}

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing: a step follows from its number."""

    def _followed(self, groups: GroupSet) -> GroupSet:
        """Adds the log-probs of the reference that follows the policy, if there is one, scored when they are needed."""
        if (reference := self.following) is None:
            return groups

        def ref_logps(part: Part) -> Columns:
            logps = torch.cat(reference.logps([groups.groups[i] for i in part]))
            return Columns(per_token={"ref_logps": logps})

        return replace(groups, columns={**groups.columns, "ref_logps": ref_logps})


def _take(whole: GroupSet, indices: Sequence[int]) -> GroupSet:
    """The groups at these indices, read into memory, since the groups of a step are used more than once."""

    def taken(supply: Supply) -> Supply:
        return lambda part: supply([indices[i] for i in part])

    return replace(
        whole,
        groups=[whole.groups[i] for i in indices],
        columns={name: taken(supply) for name, supply in whole.columns.items()},
        also={},
        indices=indices,
    )
