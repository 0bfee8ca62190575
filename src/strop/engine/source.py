"""What the loop asks for: the groups of each step and those it evaluates on, and how they are cut. Floor 3.

    StepSource.step(n) -> GroupSet      the groups of step n, with the columns beside them
    Cut.parts(GroupSet) -> parts        which of them go into one micro-batch together
    GroupSet.batch(policy, part)        the micro-batch

The loop does not know where groups come from: `offline.py` takes them from files by a plan. The set of groups decides
the result of a step; the cut is the hardware's and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from strop.batch import Batch, own_columns, own_names, structure_of
from strop.columns import NO_COLUMNS, Columns
from strop.config.methods import MethodSettings
from strop.lengths import Lengths, lengths_of
from strop.objectives.base import Objective
from strop.plan.cutting import cut
from strop.plan.tokens import RowTokens
from strop.policy.policy import Policy
from strop.types import Group
from strop.world import World

Part = Sequence[int]
"""Places in a `GroupSet`, from 0, of the groups of one micro-batch."""

Supply = Callable[[Part], Columns]
"""Gives one column of the groups at these places, made or read when it is asked for."""


@dataclass(frozen=True)
class GroupSet:
    """Groups with what is laid beside them.

    groups: read from the disk when one is asked for, where they lie there. columns: what lies beside them, by name.
    also: further groups that the objective reads the scores of, by name. wants: columns that the policy is to supply.
    indices: the numbers that the groups have in their source.
    """

    groups: Sequence[Group]
    columns: Mapping[str, Supply] = field(default_factory=dict)
    also: Mapping[str, GroupSet] = field(default_factory=dict)
    wants: frozenset[str] = frozenset()
    indices: Sequence[int] | None = None

    @property
    def supplies(self) -> frozenset[str]:
        """Names of the columns that lie beside the groups, with those that they have themselves."""
        return own_names(self.groups[0]).union(self.columns)

    @property
    def lengths(self) -> Lengths:
        """The lengths of the groups, which are known without reading them."""
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
    """How sets of groups come in micro-batches: each of at most `budget_tokens`, as `tokens` counts them; a group that
    is longer stands alone."""

    budget_tokens: int
    tokens: RowTokens

    def parts(self, groups: GroupSet) -> list[list[int]]:
        """The micro-batches of a set."""
        return cut(groups.lengths, range(len(groups.groups)), self.budget_tokens, self.tokens)

    def smaller(self, groups: GroupSet) -> Cut | None:
        """One in which the largest micro-batches of this set, and of its further groups, come in two; None: each is one
        group already."""
        largest = max(self._divisible(some) for some in (groups, *groups.also.values()))
        return Cut(largest // 2, self.tokens) if largest else None

    def _divisible(self, groups: GroupSet) -> int:
        """Tokens of the largest micro-batch of several groups, or 0."""
        lengths = groups.lengths
        parts = (part for part in self.parts(groups) if len(part) > 1)
        return max((self.tokens([lengths[i] for i in part]) for part in parts), default=0)


class StepSource(Protocol):
    """Where the groups of a run come from. num_steps: steps of the run. validation: what is evaluated on, if anything.

    What a step is made of is a function of the step's number and, where `ahead` is false, of the weights before it.
    """

    num_steps: int
    validation: GroupSet | None
    supplies: frozenset[str]
    """Names of the columns that lie beside the groups of every step."""
    also: frozenset[str]
    """Names of the further groups of every step."""
    ahead: bool
    """Whether a step's groups and columns are known before the step before it is done."""

    def step(self, step: int) -> GroupSet:
        """The groups of a step, from 1, in the order in which their margins are written."""

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch), both from 0, of a step from 1."""

    def epochs(self, step: int) -> float:
        """Epochs that are done after so many steps."""

    def after(self, step: int) -> None:
        """Told when a step has changed the weights."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What checkpoints keep of the source beside the number of the step, by name; loaded in place."""


@dataclass(frozen=True)
class MicroBatches:
    """A set of groups as micro-batches. cut: all of them, as places in the set. batches: those of this process. also:
    those of this process of the further groups, by name."""

    groups: GroupSet
    cut: tuple[tuple[int, ...], ...]
    batches: Sequence[Batch]
    also: Mapping[str, Sequence[Batch]]

    @classmethod
    def of(cls, groups: GroupSet, cut: Cut, policy: Policy, world: World) -> MicroBatches:
        def own(some: GroupSet, parts: Sequence[Part]) -> list[Batch]:
            return [some.batch(policy, part) for part in world.deal(parts)[world.rank]]

        parts = cut.parts(groups)
        also = {name: own(others, cut.parts(others)) for name, others in groups.also.items()}
        return cls(groups, tuple(map(tuple, parts)), own(groups, parts), also)

    @property
    def num_tokens(self) -> int:
        """Tokens that this process feeds to the model, padding left out."""
        return sum(batch.num_tokens for some in (self.batches, *self.also.values()) for batch in some)
