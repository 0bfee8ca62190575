"""The contract of an objective: a pure function of log-probs, what it reads and what it is divided by. Floor 2.

Shapes: M scored tokens, P scored prompt tokens, C completions, G groups. An objective returns sums. The engine counts
the unit of each term over the whole optimizer step (all micro-batches, all ranks) and divides once, so a loss does not
depend on how the step is cut. The loss of a step is the sum over terms of terms[t] / units[t](structure of the step).

Columns that are supplied today, and by whom:

    ref_logps      [M]  the source of the steps   log-probs under the reference
    labels         [G]  the source of the steps   whether a completion is a desirable one
    margin         [G]  the source of the steps   by how much the chosen completion of a pair is better
    rewards        [C]  the source of the steps   how good a completion is
    normalised_rewards  [C]  the source of the steps   the same where each of several rewards is normalised over the
                                                  group before they are added up
    ended          [C]  the source of the steps   1 where a completion came to its end, 0 where it was cut off
    old_logps      [M]  the source of the steps   log-probs under the policy that ratios are taken to
    sampler_logps  [M]  the source of the steps   log-probs as what sampled the tokens has them
    prompt_logps   [P]  the policy                log-probs of each prompt's tokens but the first, with gradients
    divergence     [M]  the policy                how far its distribution is from the teacher's, with gradients
    teacher_logps  [M]  the policy                log-probs under the teacher, without gradients
    collisions     [M]  the policy                log(sum over the vocabulary of p^2), the log-prob that two tokens
                                                  drawn there are the same; without gradients
    entropies      [M]  the policy                entropy of its distribution, in nats, with gradients
    advantages     [M]  grpo derives them         from the rewards of the whole step
    counted        [M]  grpo derives them         0 for tokens that are left out of the loss, above 1 for the others,
                                                  so that the loss is the mean over these
    explored       [M]  grpo derives them         the same for the mean of entropies, which is one over tokens

and further groups (`also`):

    mismatched    every prompt of the step with a completion of another row, drawn anew each epoch; has ref_logps

An objective works on tensors only and turns none into a Python number, because that would wait for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from strop.batch import Scores
from strop.columns import NO_COLUMNS, Columns, Structure, Unit
from strop.config.methods import MethodSettings
from strop.types import Group, RowShape

S = TypeVar("S", bound=MethodSettings)

Mean = tuple[Tensor | float, Tensor | int]
"""A metric as (sum, count): the caller adds both up and divides at the end. A count that depends on the values of a
column is a tensor; the others follow from the structure."""

FetchedMean = tuple[float, int]
"""A `Mean` on the host, as the record of a step has it."""


MISMATCHED = "mismatched"
"""Further groups: the prompts of the step with completions of other rows."""

OLD_LOGPS = "old_logps"
"""The column that `old_logps` reads where it is supplied."""


@dataclass(frozen=True, slots=True)
class RefSync:
    """Every this many steps, the weights of the reference become share x the policy's + (1 - share) x their own."""

    every_steps: int
    share: float


class Objective(ABC, Generic[S]):
    """One method with its settings.

    The class declares `METRICS`: how to read each metric of its variants.

    Declared by the instance, since variants differ: `reads`, the columns it needs beside the log-probs; `may_read`,
    those that it reads only where they are supplied; `derives`, the columns that it makes of those of a whole step
    before anything is scored (`derive`); `also`, further groups that are scored first and without gradients, whose
    scores it finds in `scores.also`; `units`, what each term is divided by; `whole_step`, whether the terms hold a
    statistic of the whole step: `terms` is then called once with the scores of the whole step, else once per
    micro-batch; `ref_sync`, whether the reference follows the policy instead of staying as it is.
    """

    METRICS: ClassVar[Mapping[str, str]]

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    def rows(self) -> RowShape:
        """The shape of its rows: single completions, pairs, labelled completions or groups."""
        return self.settings.ROWS

    @property
    def whole_step(self) -> bool:
        return False

    @property
    def reads(self) -> frozenset[str]:
        """Names of the columns that it needs."""
        return frozenset()

    @property
    def may_read(self) -> frozenset[str]:
        """Names of the columns that it reads where they are supplied, and does without where they are not."""
        return frozenset()

    @property
    def derives(self) -> frozenset[str]:
        """Names of the columns that `derive` gives."""
        return frozenset()

    def derive(self, structure: Structure, columns: Columns) -> Columns:
        """Columns that follow from those beside the groups of a whole step. They do not depend on the policy, so a
        statistic of the step in them costs no second pass. On the CPU, without gradients."""
        return NO_COLUMNS

    def has_signal(self, group: Group) -> bool:
        """Whether comparing the completions of a group teaches anything: not all of them are the same."""
        first, *rest = group.completions
        return not rest or any(c != first for c in rest)

    def describe(self) -> Iterator[str]:
        """Lines of text: what the name of the method does not say."""
        return iter(())

    @property
    def also(self) -> frozenset[str]:
        """Names of the further groups whose scores it reads."""
        return frozenset()

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the log-probs of a reference."""
        return "ref_logps" in self.reads

    @property
    def ref_sync(self) -> RefSync | None:
        return None

    @property
    def has_loss_on_samples(self) -> bool:
        """Whether its loss of held-out completions that the policy samples itself says how good the policy is. Losses
        that compare rewards do not: these are measured in their place."""
        return False

    @property
    @abstractmethod
    def units(self) -> Mapping[str, Unit]:
        """Term name -> what its sum over the step is divided by."""

    @abstractmethod
    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        """Term name -> its sum over `scores`, a float64 scalar that can be differentiated."""

    @abstractmethod
    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        """Metric name -> (sum, count) over `scores`; called without gradients."""

    @property
    def evaluated(self) -> list[str]:
        """Names of all numbers that an evaluation may have: the loss, its terms, the metrics of its variants."""
        return ["loss", *([f"loss/{t}" for t in self.units] if len(self.units) > 1 else []), *self.METRICS]

    def margins(self, scores: Scores) -> Tensor | None:
        """[G] float64: chosen minus rejected of each pair, without beta; None: the method has none. Called without
        gradients."""
        return None


def old_logps(scores: Scores) -> Tensor:
    """[M] float64 without a gradient: under the policy that ratios are taken to, else under the policy itself."""
    supplied = OLD_LOGPS in scores.columns.names
    return (scores[OLD_LOGPS] if supplied else scores.logps).detach().double()


def build_objective(settings: MethodSettings) -> Objective[MethodSettings]:
    """The objective of these settings, which their class names."""
    return objective_class(type(settings))(settings)


def objective_class(settings: type[MethodSettings]) -> type[Objective[MethodSettings]]:
    """The class of the objective that settings of this class belong to."""
    module, _, name = settings.OBJECTIVE.partition(":")
    cls: type[Objective[MethodSettings]] = getattr(import_module(f"strop.objectives.{module}"), name)
    return cls
