"""Where the loop gets its groups from, and how they are cut into micro-batches. Floor 3.

    StepSource.step(n) -> GroupSet      the groups of step n, with their columns
    Cut.parts(GroupSet) -> parts        which groups go into one micro-batch
    GroupSet.batch(policy, part)        the micro-batch

The loop does not know where groups come from; `offline_source.py` takes them from files in the order of a plan. The
groups decide the result of a step. The cut depends on the hardware and does not change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from strop.batch import Batch, own_columns, own_names, structure_of
from strop.columns import NO_COLUMNS, Columns
from strop.config.methods import MethodSettings
from strop.engine.evaluation_contract import Evaluator, Watcher
from strop.lengths import Lengths, lengths_of
from strop.objectives.base import FetchedMean, Objective
from strop.plan.cutting import cut
from strop.plan.dealing import BY_TOKENS, GroupCost, deal
from strop.plan.row_tokens import RowTokens
from strop.policy.policy import Policy
from strop.types import Group
from strop.world import World

Part = Sequence[int]
"""The groups of one micro-batch, as places in a `GroupSet`, from 0."""

Supply = Callable[[Part], Columns]
"""Computes or reads one column for the groups at these places."""


@dataclass(frozen=True)
class GroupSet:
    """Groups with their columns.

    groups: may lie on disk; each is read when it is used. columns: by name. also: further groups whose scores the
    objective reads, by name. wants: names of the columns that the policy has to supply. indices: the numbers of the
    groups in their source.
    """

    groups: Sequence[Group]
    columns: Mapping[str, Supply] = field(default_factory=dict)
    also: Mapping[str, GroupSet] = field(default_factory=dict)
    wants: frozenset[str] = frozenset()
    indices: Sequence[int] | None = None

    @property
    def supplies(self) -> frozenset[str]:
        """Names of the columns that come with the groups, including those that groups carry themselves."""
        return own_names(self.groups[0]).union(self.columns)

    @property
    def lengths(self) -> Lengths:
        """The lengths of the groups. Stored groups know them without being read."""
        return lengths_of(self.groups)

    def derived(self, objective: Objective[MethodSettings]) -> GroupSet:
        """The set of a whole step, with the columns that the objective derives from those of all its groups."""
        if not objective.derives:
            return self
        structure, columns = structure_of(self.groups), own_columns(self.groups)
        everywhere = range(len(self.groups))
        for supplied in self.columns.values():
            columns = columns.beside(supplied(everywhere))
        found = objective.derive(structure, columns)

        def supply(name: str) -> Supply:
            each = found.only(name).split(structure)
            return lambda part: Columns.join([each[i] for i in part])

        return replace(self, columns={**self.columns, **{name: supply(name) for name in objective.derives}})

    def batch(self, policy: Policy, part: Part) -> Batch:
        columns = NO_COLUMNS
        for supply in self.columns.values():
            columns = columns.beside(supply(part))
        return policy.collate([self.groups[i] for i in part], columns, self.wants)


@dataclass(frozen=True)
class Cut:
    """How groups are cut into micro-batches: each has at most `budget_tokens` as counted by `tokens`, or is one group
    that is longer than that. With several processes, each first gets its groups, of about the same `cost`."""

    budget_tokens: int
    tokens: RowTokens
    cost: GroupCost = BY_TOKENS

    def parts(self, groups: GroupSet) -> list[list[int]]:
        """The micro-batches of one process that has all groups."""
        return cut(groups.lengths, range(len(groups.groups)), self.budget_tokens, self.tokens)

    def shares(self, groups: GroupSet, num_processes: int) -> list[list[list[int]]]:
        """The micro-batches of each process, by rank. Some may have none."""
        if num_processes == 1:
            return [self.parts(groups)]
        lengths = groups.lengths
        dealt = deal(self.cost.of_each(lengths, self.tokens), num_processes)
        return [cut(lengths, share, self.budget_tokens, self.tokens) if share else [] for share in dealt]

    def smaller(self, groups: GroupSet, num_processes: int = 1) -> Cut | None:
        """A cut that splits the largest micro-batch of these groups and their further groups in two; None if every
        micro-batch is a single group already."""
        largest = max(self._divisible(some, num_processes) for some in (groups, *groups.also.values()))
        return replace(self, budget_tokens=largest // 2) if largest else None

    def _divisible(self, groups: GroupSet, num_processes: int) -> int:
        """Tokens of the largest micro-batch that has several groups; 0 if there is none."""
        lengths = groups.lengths
        parts = (part for share in self.shares(groups, num_processes) for part in share if len(part) > 1)
        return max((self.tokens([lengths[i] for i in part]) for part in parts), default=0)


class StepSource(Protocol):
    """Where the groups of a run come from.

    num_steps: the steps of the run. validation: the groups to evaluate on, if there are any that are known before the
    run. The content of a step depends on its number only, and, if `ahead` is False, on the weights before it.
    """

    num_steps: int
    validation: GroupSet | None
    supplies: frozenset[str]
    """Names of the columns that come with the groups of every step."""
    also: frozenset[str]
    """Names of the further groups of every step."""
    ahead: bool
    """Whether the groups and columns of a step are known before the previous step is done."""

    def step(self, step: int) -> GroupSet:
        """The groups of a step, from 1, in the order in which their margins are written."""

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch), both from 0, of a step from 1."""

    def metrics(self, step: int) -> Mapping[str, FetchedMean]:
        """What the source itself measured when it made the step that was asked for last, as (sum, count)."""

    def evaluator(self, watcher: Watcher, should_stop: Callable[[], bool]) -> Evaluator | None:
        """What evaluates the policy where there is no `validation`; None: nothing does."""

    def epochs(self, step: int) -> float:
        """How many epochs this many steps are, as a fraction."""

    def after(self, step: int) -> None:
        """Called after each step, when the weights have changed."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the source that checkpoints must hold, by name. They are loaded in place."""

    def state(self) -> Mapping[str, Any]:
        """What else a checkpoint must hold so that the next step is the same after a resume, as JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from such a state."""


@dataclass(frozen=True)
class MicroBatches:
    """Groups cut into micro-batches.

    cut: the micro-batches of all processes, rank by rank, as places in `groups`. batches: those of this process, as
    tensors. also: the same for the further groups, by name.
    """

    groups: GroupSet
    cut: tuple[tuple[int, ...], ...]
    batches: Sequence[Batch]
    also: Mapping[str, Sequence[Batch]]

    @classmethod
    def of(cls, groups: GroupSet, cut: Cut, policy: Policy, world: World) -> MicroBatches:
        shares = cut.shares(groups, world.size)
        batches = [groups.batch(policy, part) for part in shares[world.rank]]
        also = {
            name: [others.batch(policy, part) for part in cut.shares(others, world.size)[world.rank]]
            for name, others in groups.also.items()
        }
        return cls(groups, tuple(tuple(part) for share in shares for part in share), batches, also)

    @property
    def num_tokens(self) -> int:
        """Tokens that this process feeds to the model, without padding."""
        return sum(batch.num_tokens for some in (self.batches, *self.also.values()) for batch in some)
