"""Whether the loss has moved at all after a tenth of the run, and which rate would move it. Floor 3."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

STILL = 1e-3
"""A loss that never was further from its first value than this share of it has not left it."""
WANTED = 1e-2
"""The share of its first value by which a loss should fall until the end of a run."""
RECENT = 5
"""The loss now is the mean of so many steps."""


class StalledLoss:
    """Told the loss of every step from the first on; a resumed run, which does not know the first, says nothing."""

    def __init__(self, num_steps: int, rate: Callable[[int], float]) -> None:
        """rate: the learning rate of a step, from 1."""
        self._num_steps, self._rate, self._seen = num_steps, rate, 0
        self._tenth = math.ceil(num_steps / 10)
        self._first = math.nan
        self._furthest = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def after(self, step: int, loss: float) -> str | None:
        """What to say after this step; null nearly always."""
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
        """As long as a loss has hardly moved, how far it moves is in proportion to the sum of the rates."""
        now, wanted = statistics.mean(self._recent), WANTED * abs(self._first)
        noise = statistics.stdev(self._recent) / math.sqrt(len(self._recent))
        fallen = self._first - now
        so_far, all_of_them = self._rates_up_to(step), self._rates_up_to(self._num_steps)
        ends = fallen * sum(all_of_them) * self._num_steps / len(all_of_them) / (sum(so_far) * step / len(so_far))
        peak = max(all_of_them)
        if fallen > 2 * noise and ends > 0:
            if ends >= wanted:
                return None
            factor = min(wanted / ends, 1000.0)
            words = f"at this rate it will have fallen by about {ends:.1g} at the end"
        else:
            factor, words = 10.0, "no fall can be told from its noise"
        return (
            f"after {step} of {self._num_steps} steps the loss has not left its first value {self._first:.4f}: "
            f"{words}. A training.learning_rate of about {peak * factor:.0e} instead of {peak:.0e} would move it"
        )

    def _rates_up_to(self, step: int) -> list[float]:
        """The rates of evenly spaced steps, a thousand at most."""
        return [self._rate(at) for at in range(1, step + 1, math.ceil(step / 1000))]
