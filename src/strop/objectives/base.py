"""The contract of an objective: what it needs, what it divides by, and a pure function of log-probs. Floor 2.

Shapes: M scored tokens, C completions, G groups. An objective returns sums. The engine counts each term's unit over
the whole optimizer step (all micro-batches, all ranks) and divides once, so a loss does not depend on how the
step was cut. What a step's loss is: sum over terms of terms[t] / count(units[t]).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from strop.batch import NOTHING, Extras, Scores, Unit
from strop.config.methods import MethodSettings
from strop.types import RowShape

S = TypeVar("S", bound=MethodSettings)

Mean = tuple[Tensor | float, int]
"""A metric as (sum, count): means are taken over whatever the caller has added up."""


@dataclass(frozen=True, slots=True)
class RefSync:
    """Every so many steps the reference's weights become share x the policy's + (1 - share) x their own."""

    every_steps: int
    share: float


class Objective(ABC, Generic[S]):
    """One method, with its settings.

    Declared on the class: `needs_reference`, whether reference log-probs
    are scored before training; `METRICS`, how to read each metric of its variants.

    Declared by the instance, since variants differ: `units`, what each term is divided by; `whole_step`, whether the
    terms hold a statistic of the whole step: `terms` is then called once with the scores of the whole step, else once a
    micro-batch; `needs_mismatched`, whether they read `scores.mismatched`: then every prompt of the step is scored with
    a completion of another, drawn anew each epoch, first and without gradients; `extras`, what else they read of the
    policy; `ref_sync`, whether the reference follows the policy instead of staying as it is.
    """

    needs_reference: ClassVar[bool] = False
    METRICS: ClassVar[Mapping[str, str]]

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    def rows(self) -> RowShape:
        """What the data must keep together."""
        return self.settings.ROWS

    @property
    def whole_step(self) -> bool:
        return False

    @property
    def needs_mismatched(self) -> bool:
        return False

    @property
    def extras(self) -> Extras:
        return NOTHING

    @property
    def ref_sync(self) -> RefSync | None:
        return None

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
        """Names of the numbers that an evaluation may give: the loss, its terms, the metrics of its variants."""
        return ["loss", *([f"loss/{t}" for t in self.units] if len(self.units) > 1 else []), *self.METRICS]

    def margins(self, scores: Scores) -> Tensor | None:
        """[G] float64: chosen minus rejected of each pair, not times beta; None where the method has none. Called
        without gradients."""
        return None


def build_objective(settings: MethodSettings) -> Objective[MethodSettings]:
    """The objective that takes these settings, as their class declares."""
    return objective_class(type(settings))(settings)


def objective_class(settings: type[MethodSettings]) -> type[Objective[MethodSettings]]:
    """The class of that objective."""
    module, _, name = settings.OBJECTIVE.partition(":")
    cls: type[Objective[MethodSettings]] = getattr(import_module(f"strop.objectives.{module}"), name)
    return cls
