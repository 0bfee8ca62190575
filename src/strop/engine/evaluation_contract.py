"""Contracts of an evaluation between two steps: what measures the policy, and what shows how far it is. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Watcher(Protocol):
    """Shows how far an evaluation is."""

    def evaluating(self, num_groups: int) -> AbstractContextManager[Callable[[int], None]]: ...
    def note(self, text: str) -> None: ...


class Evaluator(Protocol):
    """Measures the policy."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the numbers that an evaluation may have."""

    @property
    def row_losses(self) -> NDArray[np.float64] | None:
        """The losses of the rows in the last evaluation (`row_losses.py`); None where its loss is no mean over rows."""

    def line(self, where: str) -> Mapping[str, Any] | None:
        """The numbers of an evaluation with the current weights, the same in all processes; None if it was stopped.

        Args:
            where: how messages name this evaluation.
        """
