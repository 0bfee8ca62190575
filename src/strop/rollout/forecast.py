"""How many groups will teach nothing: forecast from some prompts before the first step. Floor 4.

A group whose completions all have the same reward has no signal. The share of such groups is estimated by sampling for
prompts of the run as a step would. What is drawn depends on the seed and on a number that no step has, so the steps
draw what they would have drawn. Nothing of it is trained on or written to rollouts.jsonl.

The share is that of the policy before its first step, over prompts of the training rows. Training changes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np

from strop.plan.order import Plan
from strop.report.facts import wilson
from strop.rollout.collect import Collected, Collector

STEP = 0x70726F62
"""The number that stands in place of a step: no run has so many."""
AT_ONCE = 16
"""Prompts between two looks at whether to stop."""
MOST, FEWEST, SHARE = 64, 16, 0.02
"""Where the number of prompts is not given: at most this many, at least this many, and at most this share of all
prompts that the run samples for. Fewer would say too little, and a short run has no forecast."""
HIGH = 0.5
"""The share of groups without signal from which on remedies are named; docs/methods/grpo.md calls less healthy."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of the first steps.

    num_prompts: those whose rewards are known. num_left_out: those whose rewards failed. num_generations: completions
    of each. without_signal: the share of groups whose completions all have the same reward; low, high: its 95 %
    interval. all_lowest, all_highest: the shares of groups whose rewards are all the lowest, or all the highest, that
    were seen; both 0 where only one was seen. with_half: the share without signal at half as many completions, None
    where half is less than two. lowest, highest: the rewards.
    """

    num_prompts: int
    num_left_out: int
    num_generations: int
    without_signal: float
    low: float
    high: float
    all_lowest: float
    all_highest: float
    with_half: float | None
    lowest: float
    highest: float

    @classmethod
    def of(
        cls,
        rewards: Sequence[Sequence[float]],
        num_left_out: int = 0,
        compared: Sequence[Sequence[float]] | None = None,
    ) -> Forecast:
        """From the rewards of each prompt's completions, of which every prompt has as many.

        Args:
            compared: what tells the completions apart, if it is not the rewards themselves.
        """
        compared = rewards if compared is None else compared
        size, count = len(rewards[0]), len(rewards)
        lowest, highest = min(map(min, rewards)), max(map(max, rewards))
        apart = lowest < highest
        share = sum(without_signal(r, size) for r in compared) / count
        half = size // 2
        low, high = wilson(share, count)
        return cls(
            num_prompts=count,
            num_left_out=num_left_out,
            num_generations=size,
            without_signal=share,
            low=max(low, 0.0),
            high=min(high, 1.0),
            all_lowest=apart * sum(max(r) == lowest for r in rewards) / count,
            all_highest=apart * sum(min(r) == highest for r in rewards) / count,
            with_half=sum(without_signal(r, half) for r in compared) / count if half > 1 else None,
            lowest=lowest,
            highest=highest,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, *, draws_others: bool) -> Iterator[str]:
        """What it says, and what helps where the share is high.

        Args:
            draws_others: whether dynamic sampling is on.
        """
        left_out = f" ({self.num_left_out} others were left out: their rewards fail)" if self.num_left_out else ""
        yield (
            f"forecast from {self.num_prompts} prompts{left_out}: with {self.num_generations} completions each, "
            f"{self.without_signal:.0%} of the groups have no signal at the start (95 %: {self.low:.0%} to "
            f"{self.high:.0%}), since all their completions have the same reward{self._of_which()}"
        )
        if self.without_signal >= HIGH:
            yield f"groups without signal teach nothing: {'; '.join(self._remedies(draws_others))}"

    def _of_which(self) -> str:
        if self.lowest == self.highest:
            return f": {self.lowest:g}, for every prompt"
        return f": {self.all_lowest:.0%} the lowest ({self.lowest:g}), {self.all_highest:.0%} the highest " + (
            f"({self.highest:g})"
        )

    def _remedies(self, draws_others: bool) -> Iterator[str]:
        if self.lowest == self.highest:
            yield "see whether the rewards apply at all, and whether the model ever earns one"
        half = "" if self.with_half is None else f" (at {self.num_generations // 2} it is {self.with_half:.0%})"
        yield f"raise rollout.num_generations{half}"
        if self.all_lowest > self.all_highest:
            yield "use easier prompts, or rewards that part of an answer earns"
        elif self.all_highest > self.all_lowest:
            yield "use harder prompts"
        if not draws_others:
            yield "set rollout.dynamic_sampling: true, which draws others in their place"


def without_signal(rewards: Sequence[float], size: int) -> float:
    """The chance that `size` of these completions, drawn without putting back, all have the same reward.

    This is an unbiased estimate of the chance that a group of `size` new completions has no signal: the sum over the
    distinct rewards of C(s, size) / C(k, size), where s of the k completions have that reward. For rewards of 0 and 1
    it is [C(s, size) + C(k - s, size)] / C(k, size), as pass@k is estimated (arXiv 2107.03374).

    Raises:
        ValueError: there are fewer than `size`.
    """
    if len(rewards) < size:
        raise ValueError(f"{len(rewards)} completions say nothing about groups of {size}")
    return sum(comb(s, size) for s in Counter(rewards).values()) / comb(len(rewards), size)


def num_probed(asked: int | None, plan: Plan, num_prompts: int) -> int:
    """How many prompts are sampled for, of the `num_prompts` that there are.

    Args:
        asked: rollout.probe_prompts.
    """
    if asked is not None:
        return min(asked, num_prompts)
    sampled = plan.num_steps * min(plan.groups_per_step, plan.num_rows) // plan.passes_per_round
    found = min(MOST, int(SHARE * sampled), num_prompts)
    return found if found >= FEWEST else 0


@dataclass(frozen=True)
class Probe:
    """Samples and rewards prompts before the first step, to forecast from.

    collector: as that of training, but without scores under other models. numbers: of the prompts.
    """

    collector: Collector
    numbers: Sequence[int]

    @classmethod
    def of(cls, collector: Collector, count: int, seed: int) -> Probe:
        """`count` prompts, drawn by the seed."""
        order = np.random.default_rng([seed, STEP]).permutation(len(collector.prompts))
        return cls(collector, sorted(order[:count].tolist()))

    def run(self, done: Callable[[int], None], should_stop: Callable[[], bool]) -> Forecast | None:
        """The forecast, the same in all processes, which call it together; None where it is stopped, or no prompt has
        rewards.

        Args:
            done: told how many further prompts are done.

        Raises:
            TrainingError, ConfigError: as `Collector.collect`.
        """
        whole = Collected()
        for first in range(0, len(self.numbers), AT_ONCE):
            if should_stop():
                return None
            some = self.numbers[first : first + AT_ONCE]
            whole.add(self.collector.collect(STEP, some))
            done(len(some))
        rewards = [r.rewards.total for r in whole.rewarded]
        compared = [r.rewards.compared for r in whole.rewarded]
        return Forecast.of(rewards, len(self.numbers) - len(rewards), compared) if rewards else None
