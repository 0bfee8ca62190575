"""Prompts to the groups of every step: sampled by the policy, rewarded, written to a file. Floor 4.

A `StepSource`. The plan says which prompts make a step; what is sampled for them follows from (seed, step, prompt,
index) and the weights before the step. So a checkpoint holds nothing of it: a resumed run samples the same again.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.data.store.table import KeptRow
from strop.durable import JsonLines
from strop.engine.records import Sum
from strop.engine.source import GroupSet
from strop.errors import TrainingError
from strop.plan.order import Plan
from strop.rollout.sampler import Prompt, Sampled, Sampler
from strop.rollout.scoring import Failures, Scored, Scorer
from strop.types import Completion, Group
from strop.world import World


class Prompts(Protocol):
    """Groups whose prompts are sampled for; their completions are not looked at."""

    @property
    def rooms(self) -> np.ndarray:
        """[prompts] tokens that a completion of each has at most."""

    def __getitem__(self, number: int) -> Group: ...
    def kept(self, number: int) -> KeptRow:
        """The row of a prompt, for the rewards."""


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What was sampled for one prompt of a step.

    place: of the prompt in the step, from 0. texts: the completions, without special tokens.
    """

    place: int
    completions: Sequence[Sampled]
    texts: Sequence[str]
    rewards: Scored


@dataclass(frozen=True, slots=True)
class Share:
    """What one process made of its prompts of a step; a prompt is not in it if its rewards failed and it is left out.

    seconds: by phase.
    """

    rewarded: Sequence[Rewarded]
    failures: Failures
    seconds: Mapping[str, float]


class RolloutSource:
    """Samples the groups of a step when they are asked for.

    Args:
        log: the file to which every sampled group is written. note: called with a message about rewards that fail.
    """

    validation: GroupSet | None = None
    also: frozenset[str] = frozenset()
    ahead = False
    supplies = frozenset({"rewards", "old_logps"})

    def __init__(
        self,
        plan: Plan,
        prompts: Prompts,
        sampler: Sampler,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        log: Path,
        note: Callable[[str], None],
        world: World,
    ) -> None:
        self.plan, self.num_steps = plan, plan.num_steps
        self._prompts, self._rooms = prompts, prompts.rooms
        self._sampler, self._scorer = sampler, scorer
        self._tokenizer, self._note = tokenizer, note
        self._log, self._world = JsonLines(log), world
        self._made: tuple[int, GroupSet, Mapping[str, Sum]] | None = None
        self._has_warned = False

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
        """Nothing: the next step is sampled when it is asked for, with the weights of then."""

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def rewind(self, step: int) -> None:
        """Removes the groups after `step` from the log: a resumed run samples them again."""
        if self._world.is_main and self._log.path.exists():
            self._log.retain(lambda record: record["step"] <= step if isinstance(record.get("step"), int) else None)

    def close(self) -> None:
        self._scorer.close()
        self._log.close()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _make(self, step: int) -> tuple[GroupSet, Mapping[str, Sum]]:
        """Every process samples for its share of the prompts, and all get all groups."""
        numbers = self.plan.groups(step)
        prompts = [self._prompts[number] for number in numbers]
        places = self._world.own_share(range(len(numbers)))
        shares = self._world.gather(self._share(step, numbers, prompts, places))
        failures = Failures()
        for share in shares:
            failures.add(share.failures)
        self._warn_once(step, failures)
        rewarded = sorted((r for share in shares for r in share.rewarded), key=lambda r: r.place)
        if not rewarded:
            raise TrainingError(
                f"no prompt of this step has rewards: {failures.first}",
                where=f"step {step}",
                fix="mend the rewards, or set rollout.on_reward_error: value",
            )
        if self._world.is_main:
            for r in rewarded:
                self._log.append(self._line(step, numbers[r.place], prompts[r.place], r))
        slowest = {phase: max(share.seconds[phase] for share in shares) for phase in shares[0].seconds}
        groups = [_group(prompts[r.place], r) for r in rewarded]
        indices = [numbers[r.place] for r in rewarded]
        return GroupSet(groups, indices=indices), self._measured(rewarded, failures, slowest)

    def _share(self, step: int, numbers: Sequence[int], prompts: Sequence[Group], places: Sequence[int]) -> Share:
        """Samples and rewards the prompts at these places of the step.

        Args:
            numbers: of the prompts of the step in the plan. prompts: the prompts themselves.
        """
        started = time.perf_counter()
        sampled = self._sampler.sample(
            step, [Prompt(numbers[i], prompts[i].prompt_ids, int(self._rooms[numbers[i]])) for i in places]
        )
        sampled_at = time.perf_counter()
        failures = Failures()
        found = [
            self._rewarded(i, numbers[i], prompts[i], own, failures) for i, own in zip(places, sampled, strict=True)
        ]
        seconds = {"time/sample": sampled_at - started, "time/reward": time.perf_counter() - sampled_at}
        return Share([r for r in found if r is not None], failures, seconds)

    def _rewarded(
        self, place: int, number: int, prompt: Group, completions: Sequence[Sampled], failures: Failures
    ) -> Rewarded | None:
        texts = [self._text(c.ids) for c in completions]
        lengths = [len(c.ids) for c in completions]
        row, origin = self._prompts.kept(number), prompt.origin
        scored = self._scorer.score(self._text(prompt.prompt_ids), texts, lengths, row, origin, failures)
        return None if scored is None else Rewarded(place, completions, texts, scored)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _warn_once(self, step: int, failures: Failures) -> None:
        if failures.counts and not self._has_warned:
            self._has_warned = True
            self._note(f"step {step}: {failures.first}; further ones are counted in rewards/failed")

    def _measured(
        self, rewarded: Sequence[Rewarded], failures: Failures, seconds: Mapping[str, float]
    ) -> Mapping[str, Sum]:
        completions = [c for r in rewarded for c in r.completions]
        done = [len(c.ids) for c in completions if c.ended]
        metrics: dict[str, Sum] = {name: (value, 1) for name, value in seconds.items()}
        metrics["completions/clipped_ratio"] = (float(len(completions) - len(done)), len(completions))
        metrics["completions/mean_terminated_length"] = (float(sum(done)), len(done))
        metrics["rewards/failed"] = (float(failures.counts.total()), 1)
        for name in self._scorer.names:
            values = [v for r in rewarded for v in r.rewards.each[name]]
            metrics[f"rewards/{name}/mean"] = (sum(values), len(values))
        return metrics

    def _line(self, step: int, number: int, prompt: Group, rewarded: Rewarded) -> dict[str, Any]:
        """A group as a row of a file that can be trained on as it is."""
        completions, rewards = rewarded.completions, rewarded.rewards
        return {
            "step": step,
            "prompt_number": number,
            "where": str(prompt.origin),
            "prompt": self._text(prompt.prompt_ids),
            "texts": list(rewarded.texts),
            "rewards": list(rewards.total),
            "rewards_by_name": {name: list(values) for name, values in rewards.each.items()},
            "ended": [c.ended for c in completions],
            "prompt_ids": list(prompt.prompt_ids),
            "completion_ids": [list(c.ids) for c in completions],
            "old_logps": [list(c.logps) for c in completions],
        }


def _group(prompt: Group, rewarded: Rewarded) -> Group:
    completions = tuple(Completion(c.ids, b"\1" * len(c.ids)) for c in rewarded.completions)
    logps = array("d", chain.from_iterable(c.logps for c in rewarded.completions))
    numbers = {"rewards": array("d", rewarded.rewards.total), "old_logps": logps}
    return Group(prompt.prompt_ids, completions, prompt.origin, numbers=numbers)
