"""How sure a mean over rows is: percentile bootstrap (Efron, 1979). Floor 8.

Rows are drawn anew with replacement, the same ones for all models. So the interval of a difference between two models
is that of paired rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.95
_AT_ONCE = 4_000_000
"""Weights of rows that are in memory at a time."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean as sums and counts of every row, both [G]: the sum of all sums over the sum of all counts."""

    sums: Numbers
    counts: Numbers


Metric = Sequence[Ratio]
"""A number that is the sum of such means, as a loss of several terms is."""


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


def resampled(metrics: Sequence[Metric], seed: int) -> list[Numbers]:
    """[DRAWS] each number over rows that are drawn anew, the same rows for all numbers; empty where there are fewer
    than two rows.

    Args:
        metrics: all of the same rows.
    """
    num_rows = len(metrics[0][0].sums) if metrics else 0
    if num_rows < 2:
        return [np.empty(0) for _ in metrics]
    drawn = [[value(metric, weights) for metric in metrics] for weights in _draws(num_rows, seed)]
    return [np.concatenate(parts) for parts in zip(*drawn, strict=True)]


def value(metric: Metric, weights: Numbers) -> Numbers:
    """The number where every row counts as often as `weights` [..., G] says; NaN where no row counts."""
    found: Numbers = np.sum([_ratio(weights @ part.sums, weights @ part.counts) for part in metric], axis=0)
    return found


def interval(drawn: Numbers) -> Interval | None:
    """Where a number lies with a probability of `LEVEL`, by its values over rows drawn anew; for a difference, by the
    differences of these. None: there are too few rows to say."""
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _draws(num_rows: int, seed: int) -> Iterator[Numbers]:
    """[draws, rows] how often each row was drawn, a few draws at a time."""
    random, left = np.random.default_rng(seed), DRAWS
    while left:
        size = min(left, max(1, _AT_ONCE // num_rows))
        yield random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=size).astype(np.float64)
        left -= size


def _ratio(total: Numbers, count: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total / count)
