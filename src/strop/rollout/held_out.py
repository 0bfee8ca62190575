"""How good the policy is at prompts that it does not train on: sampled and rewarded at every evaluation. Floor 4."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from strop.engine.evaluation_contract import Watcher
from strop.engine.metrics import held_out_metrics, means
from strop.rollout.collect import Collected, Collector, measured
from strop.types import Group

AT_ONCE = 64
"""Prompts between two looks at whether to stop."""

NORMAL = 1.96
"""Standard errors to either side of a mean within which it lies with a probability of 95 %."""


class Losses(NamedTuple):
    """The loss of what was sampled, where it says how good the policy is. names: of its numbers. of: groups, what shows
    how far it is, and a name for messages, to the numbers; the same in all processes, which call it together."""

    names: Sequence[str]
    of: Callable[[Sequence[Group], Watcher, str], Mapping[str, Any]]


class HeldOut:
    """An `Evaluator`: the mean reward of completions of held-out prompts. The same random numbers are drawn with every
    time, so two evaluations differ by the policy alone.

    Args:
        collector: of the held-out prompts. settle: waits until nothing else is drawn.
        should_stop: whether to end an evaluation without a result. All processes call it together.
    """

    row_losses = None

    def __init__(
        self,
        collector: Collector,
        watcher: Watcher,
        should_stop: Callable[[], bool],
        losses: Losses | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._settle = settle
        self._collector, self._watcher, self._should_stop = collector, watcher, should_stop
        self._losses = losses
        self.names = [*held_out_metrics(collector.reward_names), *(losses.names if losses is not None else ())]

    def line(self, where: str) -> Mapping[str, Any] | None:
        self._settle()
        started, whole = time.perf_counter(), Collected()
        prompts = range(len(self._collector.prompts))
        with self._watcher.evaluating(len(prompts)) as done:
            for first in range(0, len(prompts), AT_ONCE):
                if self._should_stop():
                    return None
                some = prompts[first : first + AT_ONCE]
                whole.add(self._collector.collect(0, some))  # steps of training count from 1
                done(len(some))
        losses: Mapping[str, Any] = {}
        if self._losses is not None and whole.rewarded:
            losses = self._losses.of([without_old_logps(r.group) for r in whole.rewarded], self._watcher, where)
        numbers = self._collector.world.on_main(lambda: self._numbers(whole))  # the last bits may depend on the machine
        return {**losses, **numbers, "seconds": time.perf_counter() - started}

    def _numbers(self, whole: Collected) -> dict[str, Any]:
        names = self._collector.reward_names
        metrics = measured(whole.rewarded, whole.failures, names)
        lengths = [n for r in whole.rewarded for n in r.lengths]
        metrics["completions/mean_length"] = (float(sum(lengths)), len(lengths))
        found = means({n: total for n, (total, _) in metrics.items()}, {n: count for n, (_, count) in metrics.items()})
        return {
            **(mean_reward([r.rewards.total for r in whole.rewarded]) if names else {}),
            **found,
            "num_groups": len(whole.rewarded),
            "num_scored_tokens": sum(lengths),
        }


def without_old_logps(group: Group) -> Group:
    """The group without log-probs of sampling, which in an evaluation are those of another temperature."""
    return replace(group, numbers={name: x for name, x in group.numbers.items() if name != "old_logps"})


def mean_reward(of_prompts: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean reward, and the interval that it lies in with a probability of 95 %, by its standard error over prompts.

    Args:
        of_prompts: the rewards of each prompt's completions.
    """
    if not of_prompts:
        return {}
    each = np.array([np.mean(rewards) for rewards in of_prompts])
    mean = float(each.mean())
    found = {"reward": mean}
    if len(each) > 1:
        error = NORMAL * float(each.std(ddof=1)) / len(each) ** 0.5
        found |= {"reward_low": mean - error, "reward_high": mean + error}
    return found
