"""Prompts to the groups of every step: sampled by the policy, rewarded, written to a file. Floor 4.

A `StepSource`. The plan says which prompts make a step; what is sampled for them follows from (seed, step, prompt,
index) and the weights before the step. So a checkpoint holds nothing of it: a resumed run samples the same again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from strop.columns import Columns
from strop.durable import JsonLines
from strop.engine.evaluator import Evaluator, Watcher
from strop.engine.records import Sum
from strop.engine.source import GroupSet, Part, Supply
from strop.errors import TrainingError
from strop.plan.order import Plan
from strop.rollout.collect import Collected, Collector, Rewarded, joined, measured
from strop.rollout.held_out import HeldOut
from strop.rollout.scoring import Failures
from strop.world import World


class RolloutSource:
    """Samples the groups of a step when they are asked for.

    Args:
        held_out: samples for the prompts that the policy is evaluated on, if there are any.
        log: the file to which every sampled group is written. note: called with a message about rewards that fail.
    """

    validation: GroupSet | None = None
    also: frozenset[str] = frozenset()
    ahead = False

    def __init__(
        self,
        plan: Plan,
        collector: Collector,
        held_out: Collector | None,
        log: Path,
        note: Callable[[str], None],
        world: World,
    ) -> None:
        self.plan, self.num_steps = plan, plan.num_steps
        self._collector, self._held_out = collector, held_out
        self.supplies = collector.supplies
        self._note, self._log, self._world = note, JsonLines(log), world
        self._made: tuple[int, GroupSet, dict[str, Sum]] | None = None
        self._made_at = 0.0
        self._has_warned = False

    def step(self, step: int) -> GroupSet:
        if self._made is None or self._made[0] != step:
            self._made = (step, *self._make(step))
            self._made_at = time.perf_counter()
        return self._made[1]

    def metrics(self, step: int) -> Mapping[str, Sum]:
        assert self._made is not None and self._made[0] == step
        return self._made[2]

    def place(self, step: int) -> tuple[int, int]:
        return self.plan.position(step)

    def epochs(self, step: int) -> float:
        return step / self.plan.steps_per_epoch

    def evaluator(self, watcher: Watcher, should_stop: Callable[[], bool]) -> Evaluator | None:
        return None if self._held_out is None else HeldOut(self._held_out, watcher, should_stop)

    def after(self, step: int) -> None:
        """Notes how long the step trained. The next one is sampled when it is asked for, with the weights of then."""
        assert self._made is not None and self._made[0] == step
        self._made[2]["time/train"] = (time.perf_counter() - self._made_at, 1)

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def rewind(self, step: int) -> None:
        """Removes the groups after `step` from the log: a resumed run samples them again."""
        if self._world.is_main and self._log.path.exists():
            self._log.retain(lambda record: record["step"] <= step if isinstance(record.get("step"), int) else None)

    def close(self) -> None:
        self._collector.close()
        self._log.close()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _make(self, step: int) -> tuple[GroupSet, dict[str, Sum]]:
        done = self._collector.collect(step, self.plan.groups(step))
        self._warn_once(step, done.failures)
        if not done.rewarded:
            raise TrainingError(
                f"no prompt of this step has rewards: {done.failures.first}",
                where=f"step {step}",
                fix="mend the rewards, or set rollout.on_reward_error: value",
            )
        if self._world.is_main:
            for r in done.rewarded:
                self._log.append(self._line(step, r))
        return _group_set(done.rewarded), self._measured(done)

    def _warn_once(self, step: int, failures: Failures) -> None:
        if failures.counts and not self._has_warned:
            self._has_warned = True
            self._note(f"step {step}: {failures.first}; further ones are counted in rewards/failed")

    def _measured(self, done: Collected) -> dict[str, Sum]:
        seconds: dict[str, Sum] = {name: (value, 1) for name, value in done.seconds.items()}
        return seconds | measured(done.rewarded, done.failures, self._collector.reward_names)

    def _line(self, step: int, rewarded: Rewarded) -> dict[str, Any]:
        """A group as a row of a file that can be trained on as it is."""
        completions, prompt, group = rewarded.completions, rewarded.prompt, rewarded.group
        line = {
            "step": step,
            "prompt_number": rewarded.number,
            "where": str(prompt.origin),
            "prompt": self._collector.text(prompt.prompt_ids),
            "texts": list(rewarded.texts),
            "rewards": list(rewarded.rewards.total),
            "rewards_by_name": {name: list(values) for name, values in rewarded.rewards.each.items()},
            "ended": [c.ended for c in completions],
            "prompt_ids": list(prompt.prompt_ids),
            "completion_ids": [list(c.ids) for c in completions],
        }
        lengths = [len(c.ids) for c in completions]
        for name in ("old_logps", "sampler_logps"):
            if name in group.numbers:
                line[name] = _split(group.numbers[name], lengths)
        return line


def _split(values: Sequence[float], lengths: Sequence[int]) -> list[list[float]]:
    found, at = [], 0
    for length in lengths:
        found.append(list(values[at : at + length]))
        at += length
    return found


def _group_set(rewarded: Sequence[Rewarded]) -> GroupSet:
    """The groups of a step, with the log-probs of the reference where there is one."""
    references = [r.ref_logps for r in rewarded if r.ref_logps is not None]
    columns: dict[str, Supply] = {}

    def ref_logps(part: Part) -> Columns:
        return Columns(per_token={"ref_logps": joined(references, part)})

    if references:
        columns["ref_logps"] = ref_logps
    return GroupSet([r.group for r in rewarded], columns, indices=[r.number for r in rewarded])
