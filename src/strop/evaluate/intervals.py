"""How sure a mean over rows is: percentile bootstrap (Efron, 1979). Floor 8.

Rows are drawn anew with replacement, the same ones for all models, so the interval of a difference between two models
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


def value(metric: Metric) -> float:
    """The number over all rows; NaN where no row counts."""
    return float(sum(_ratio(part.sums.sum(), part.counts.sum()) for part in metric))


def interval(metric: Metric, seed: int) -> Interval | None:
    """Where the number lies with a probability of `LEVEL`; None: there are too few rows to say."""
    return _interval(metric, seed, None)


def difference(one: Metric, other: Metric, seed: int) -> Interval | None:
    """The same for `other` minus `one`, on the same rows."""
    return _interval(other, seed, one)


def _interval(metric: Metric, seed: int, minus: Metric | None) -> Interval | None:
    num_rows = len(metric[0].sums)
    if num_rows < 2:
        return None
    drawn = []
    for weights in _draws(num_rows, seed):
        found = _drawn(metric, weights)
        drawn.append(found if minus is None else found - _drawn(minus, weights))
    all_drawn = np.concatenate(drawn)
    known = all_drawn[np.isfinite(all_drawn)]
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


def _drawn(metric: Metric, weights: Numbers) -> Numbers:
    found: Numbers = np.sum([_ratio(weights @ part.sums, weights @ part.counts) for part in metric], axis=0)
    return found


def _ratio(total: Numbers, count: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total / count)
