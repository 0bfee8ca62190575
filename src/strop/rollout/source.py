"""Prompts to the groups of every step: sampled by the policy, rewarded, written down. Floor 4.

A `StepSource`. Which prompts make a step is the plan's; what is sampled for them follows from (seed, step, prompt,
index) and the weights before the step. So nothing of it stands in a checkpoint: a resumed run samples the same again.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.durable import JsonLines
from strop.engine.records import Sum
from strop.engine.source import GroupSet
from strop.errors import TrainingError
from strop.plan.order import Plan
from strop.rollout.sampler import Prompt, Sampled, Sampler
from strop.rollout.scoring import Failures, Scored, Scorer
from strop.types import Completion, Group, Origin
from strop.world import World

Share = tuple[list[tuple[int, tuple[list[Sampled], Scored | None]]], Failures, Mapping[str, float]]
"""Of one process: by place in the step, the completions of a prompt and their rewards; what failed; seconds per
phase."""

Rows = Mapping[Origin, Mapping[str, Any]]
"""The columns of every row, by where it stands."""


@dataclass(frozen=True)
class Limits:
    """Tokens of prompt and completion together, and of a completion, at most."""

    sequence: int
    completion: int | None

    def room(self, prompt: int) -> int:
        """Tokens that a completion may have after a prompt of so many."""
        left = self.sequence - prompt
        return left if self.completion is None else min(left, self.completion)


class RolloutSource:
    """The groups of step n are sampled when they are asked for.

    Args:
        prompts: groups whose prompts are sampled for; their completions are not looked at.
        log: where every group that was sampled is written down. note: how to tell of rewards that fail.
    """

    validation: GroupSet | None = None
    also: frozenset[str] = frozenset()
    ahead = False
    supplies = frozenset({"rewards", "old_logps"})

    def __init__(
        self,
        plan: Plan,
        prompts: Sequence[Group],
        rows: Rows,
        sampler: Sampler,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        log: Path,
        note: Callable[[str], None],
        world: World,
    ) -> None:
        self.plan, self.num_steps = plan, plan.num_steps
        self._prompts, self._rows, self._sampler, self._scorer = prompts, rows, sampler, scorer
        self._tokenizer, self._limits, self._note = tokenizer, limits, note
        self._log, self._world = JsonLines(log), world
        self._made: tuple[int, GroupSet, Mapping[str, Sum]] | None = None
        self._has_told = False

    def step(self, step: int) -> GroupSet:
        if self._made is None or self._made[0] != step:
            self._made = (step, *self._make(step))
        return self._made[1]

    def metrics(self, step: int) -> Mapping[str, Sum]:
        assert self._made is not None and self._made[0] == step
        return self._made[2]

    def place(self, step: int) -> tuple[int, int]:
        return self.plan.position(step)

    def epochs(self, step: int) -> float:
        return step / self.plan.steps_per_epoch

    def after(self, step: int) -> None:
        self._made = self._made if self._made is None or self._made[0] == step else None

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def rewind(self, step: int) -> None:
        """Drop what the log has after `step`: a resumed run samples it again."""
        if self._world.is_main and self._log.path.exists():
            self._log.retain(lambda record: record["step"] <= step if isinstance(record.get("step"), int) else None)

    def close(self) -> None:
        self._scorer.close()
        self._log.close()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _make(self, step: int) -> tuple[GroupSet, Mapping[str, Sum]]:
        """Every process samples for its share of the prompts, and all get all groups."""
        numbers = self.plan.groups(step)
        given = [self._prompts[i] for i in numbers]
        own = self._world.deal(range(len(numbers)))[self._world.rank]
        everywhere = self._world.gather(self._share(step, numbers, given, own))
        failures = Failures()
        for _, some, _ in everywhere:
            failures.add(some)
        self._tell(step, failures)
        made = {place: found for groups, _, _ in everywhere for place, found in groups}
        kept = [
            (numbers[place], _group(given[place], sampled, rewards.total), sampled, rewards)
            for place, (sampled, rewards) in sorted(made.items())
            if rewards is not None
        ]
        if not kept:
            raise TrainingError(
                f"no prompt of this step has rewards: {failures.first}",
                where=f"step {step}",
                fix="mend the rewards, or set rollout.on_reward_error: value",
            )
        if self._world.is_main:
            for i, group, sampled, rewards in kept:
                self._log.append(self._line(step, i, group, sampled, rewards))
        slowest = {name: max(seconds[name] for *_, seconds in everywhere) for name in everywhere[0][2]}
        metrics = self._measured([sampled for _, _, sampled, _ in kept], [r for *_, r in kept], failures, slowest)
        return GroupSet([group for _, group, _, _ in kept], indices=[i for i, *_ in kept]), metrics

    def _share(self, step: int, numbers: Sequence[int], given: Sequence[Group], own: Sequence[int]) -> Share:
        """What this process makes of the prompts at the places `own`."""
        prompts = [Prompt(numbers[n], given[n].prompt_ids, self._limits.room(len(given[n].prompt_ids))) for n in own]
        started = time.perf_counter()
        sampled = self._sampler.sample(step, prompts)
        sampled_at = time.perf_counter()
        failures = Failures()
        scored = [self._score(given[n], some, failures) for n, some in zip(own, sampled, strict=True)]
        seconds = {"time/sample": sampled_at - started, "time/reward": time.perf_counter() - sampled_at}
        return list(zip(own, zip(sampled, scored, strict=True), strict=True)), failures, seconds

    def _score(self, group: Group, sampled: Sequence[Sampled], failures: Failures) -> Scored | None:
        texts = [self._text(c.ids) for c in sampled]
        row = self._rows[group.origin]
        lengths = [len(c.ids) for c in sampled]
        return self._scorer.score(self._text(group.prompt_ids), texts, lengths, row, group.origin, failures)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tell(self, step: int, failures: Failures) -> None:
        if failures.counts and not self._has_told:
            self._has_told = True
            self._note(f"step {step}: {failures.first}; further ones are counted in rewards/failed")

    def _measured(
        self,
        sampled: Sequence[Sequence[Sampled]],
        scored: Sequence[Scored],
        failures: Failures,
        seconds: Mapping[str, float],
    ) -> Mapping[str, Sum]:
        flat = [c for own in sampled for c in own]
        done = [len(c.ids) for c in flat if c.ended]
        metrics: dict[str, Sum] = {name: (value, 1) for name, value in seconds.items()}
        metrics["completions/clipped_ratio"] = (float(len(flat) - len(done)), len(flat))
        metrics["completions/mean_terminated_length"] = (float(sum(done)), len(done))
        metrics["rewards/failed"] = (float(failures.counts.total()), 1)
        for name in self._scorer.names:
            values = [v for own in scored for v in own.each[name]]
            metrics[f"rewards/{name}/mean"] = (sum(values), len(values))
        return metrics

    def _line(self, step: int, number: int, group: Group, own: Sequence[Sampled], rewards: Scored) -> dict[str, Any]:
        """A group as a row of a file, which trains again as it is."""
        return {
            "step": step,
            "prompt_number": number,
            "where": str(group.origin),
            "prompt": self._text(group.prompt_ids),
            "texts": [self._text(c.ids) for c in own],
            "rewards": list(rewards.total),
            "rewards_by_name": {name: list(values) for name, values in rewards.each.items()},
            "ended": [c.ended for c in own],
            "prompt_ids": list(group.prompt_ids),
            "completion_ids": [list(c.ids) for c in own],
            "old_logps": [list(c.logps) for c in own],
        }


def _group(prompt: Group, sampled: Sequence[Sampled], rewards: Sequence[float]) -> Group:
    completions = tuple(Completion(c.ids, b"\1" * len(c.ids)) for c in sampled)
    logps = array("d", chain.from_iterable(c.logps for c in sampled))
    return Group(
        prompt.prompt_ids, completions, prompt.origin, numbers={"rewards": array("d", rewards), "old_logps": logps}
    )
