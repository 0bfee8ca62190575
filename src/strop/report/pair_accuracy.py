"""How often the chosen side of a pair wins, and whether two sets of pairs say opposite things. Floor 2."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from strop.report.facts import Facts, wilson
from strop.report.run_record import Table


class Accuracy(NamedTuple):
    """Share of pairs that are won, and its 95 % interval (Wilson, 1927)."""

    share: float
    low: float
    high: float

    @classmethod
    def of(cls, share: float, num_pairs: float) -> Accuracy:
        return cls(share, *wilson(min(max(share, 0.0), 1.0), num_pairs))


def at_the_end(facts: Facts, table: Table) -> Accuracy | None:
    """Over the pairs that the last lines of the table were measured on; None where it has no accuracy."""
    share, groups = facts.last("rewards/accuracies", table), table.series("num_groups")[1]
    if share is None or not len(groups):
        return None
    return Accuracy.of(share, float(facts.end(groups, table).sum()))


def at_first_sight(facts: Facts) -> Accuracy | None:
    """Of training pairs that were not trained on before: of the second half of the first epoch, or of what was done of
    it. None where the run does not say."""
    steps, table = facts.run.plan.get("steps_per_epoch"), facts.run.train
    accuracies, groups = (table.columns.get(name) for name in ("rewards/accuracies", "num_groups"))
    if not isinstance(steps, int) or accuracies is None or groups is None:
        return None
    end = min(steps, facts.run.last_step)
    fresh = (table.step > end / 2) & (table.step <= end) & np.isfinite(accuracies) & np.isfinite(groups)
    num_pairs = float(groups[fresh].sum())
    return Accuracy.of(float((accuracies[fresh] * groups[fresh]).sum()) / num_pairs, num_pairs) if num_pairs else None


def looks_exchanged(fresh: Accuracy, held: Accuracy) -> bool:
    """Whether held-out pairs are won less often than training pairs at first sight, by more than chance, and rather as
    often as exchanged ones (1 - fresh) than as by a coin. The interval of the difference is Newcombe's (1998)."""
    half = math.hypot(fresh.share - fresh.low, held.high - held.share)
    return fresh.share - held.share > half and held.share < 0.75 - fresh.share / 2
