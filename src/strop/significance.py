"""How sure a change between two evaluations of the same rows is. Floor 1, no torch.

In: the loss of each row before and after. Out: the change of the mean, and half the width of its 95 % interval. Rows
differ far more from each other than one row does between two evaluations, so only the paired difference tells a model
that got worse from noise (arXiv 2411.00640).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strop.log_arrays import read_floats
from strop.runfiles import EVALUATIONS, row_losses_array

FEWEST = 4
"""Rows; fewer say nothing of how they are spread."""
Z = 1.959964


@dataclass(frozen=True)
class Change:
    """mean: after minus before. half_width: of its 95 % interval."""

    mean: float
    half_width: float

    @property
    def is_rise(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.mean > self.half_width

    def of(self, before: float, after: float) -> Change:
        """The same interval around the change between these means, which are over all rows. Where the arrays are of a
        sample, its own mean lies further from the truth than the interval is wide."""
        return replace(self, mean=after - before)


def change(before: NDArray[np.float64], after: NDArray[np.float64], num_rows: int | None = None) -> Change | None:
    """The change of a mean over rows, by Student's t.

    Args:
        before, after: [n] of the same rows in the same order.
        num_rows: how many rows the mean is over, if these are an evenly spaced sample of them: then the interval is one
            of the mean over all, and belongs around that (`Change.of`).

    Returns:
        None where the rows are not the same ones or too few, or a number is not finite.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < FEWEST:
        return None
    difference = after - before
    if not np.isfinite(difference).all():
        return None
    error = float(difference.std(ddof=1)) / math.sqrt(num_rows or len(difference))
    return Change(float(difference.mean()), quantile(len(difference) - 1) * error)


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by Cornish and Fisher: to 4 % from 3 degrees of freedom on."""
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)


def change_of_rows(logs: Path, first: int, last: int, num_rows: int | None = None) -> Change | None:
    """The change of the loss between the evaluations after two steps, by the arrays in the logs of a run.

    Args:
        num_rows: of the evaluation, if it may have more than the arrays.

    Returns:
        None where an array is missing or damaged, or nothing can be said (`change`).
    """
    found: list[NDArray[np.float64]] = []
    for step in (first, last):
        array = read_floats(logs / EVALUATIONS / row_losses_array(step))
        if array is None or array.dtype != np.float64:
            return None
        found.append(array.astype(np.float64))
    return change(found[0], found[1], num_rows)
