"""Warns after a tenth of the run if the loss has not moved, and says which learning rate would move it. Floor 3."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

STILL = 1e-3
"""A loss has not moved if it was never further from its first value than this share of it."""
WANTED = 1e-2
"""By which share of its first value a loss should fall during a run."""
RECENT = 5
"""The current loss is the mean over this many steps."""


class StalledLoss:
    """Watches the loss from the first step on. A resumed run does not know the first loss and stays silent."""

    def __init__(self, num_steps: int, rate: Callable[[int], float]) -> None:
        """rate: returns the learning rate of a step, from 1."""
        self._num_steps, self._rate, self._seen = num_steps, rate, 0
        self._tenth = math.ceil(num_steps / 10)
        self._first = math.nan
        self._furthest = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def after(self, step: int, loss: float) -> str | None:
        """Takes the loss of a step. Returns a warning, or, nearly always, None."""
        if step != self._seen + 1 or step > self._tenth or not math.isfinite(loss):
            return None
        self._seen = step
        if step == 1:
            self._first = loss
        self._furthest = max(self._furthest, abs(loss - self._first))
        self._recent.append(loss)
        if step < self._tenth or step < RECENT + 1 or self._furthest > STILL * abs(self._first):
            return None
        return self._advice(step)

    def _advice(self, step: int) -> str | None:
        """Extrapolates to the end of the run: a loss that has hardly moved falls in proportion to the sum of the
        learning rates so far."""
        now, wanted = statistics.mean(self._recent), WANTED * abs(self._first)
        noise = statistics.stdev(self._recent) / math.sqrt(len(self._recent))
        fallen = self._first - now
        so_far, all_of_them = self._rates_up_to(step), self._rates_up_to(self._num_steps)
        if sum(so_far) == 0:
            return None  # nothing to extrapolate from; the report says that the rate is 0
        ends = fallen * sum(all_of_them) * self._num_steps / len(all_of_them) / (sum(so_far) * step / len(so_far))
        peak = max(all_of_them)
        if fallen > 2 * noise and ends > 0:
            if ends >= wanted:
                return None
            factor = min(wanted / ends, 1000.0)
            words = f"at this rate it will have fallen by about {ends:.1g} at the end"
        else:
            factor, words = 10.0, "any fall is lost in its noise"
        return (
            f"after {step} of {self._num_steps} steps the loss has not moved from its first value {self._first:.4f}: "
            f"{words}. A training.learning_rate of about {peak * factor:.0e} instead of {peak:.0e} would move it"
        )

    def _rates_up_to(self, step: int) -> list[float]:
        """The rates of evenly spaced steps, a thousand at most."""
        return [self._rate(at) for at in range(1, step + 1, math.ceil(step / 1000))]
