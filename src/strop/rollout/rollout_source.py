"""Prompts to the groups of every step: sampled by the policy, rewarded, written to a file. Floor 4.

A `StepSource`. The plan says which prompts make a step, and which steps form a round that is sampled before its first
step; what is sampled follows from (seed, step, prompt, index) and the weights at that time. So a checkpoint between two
rounds holds nothing of it: a resumed run samples the same again. Within a round it holds the groups of the round. With
`staleness`, rounds are drawn while earlier steps train (`drawn_ahead.py`).

With dynamic sampling, groups without signal are left out, and further prompts are drawn by the seed and the step. Where
pairs are trained, a group without signal has no pair and is always left out; a step without any pair draws further
prompts until it has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from strop.columns import Columns
from strop.config.methods import MethodSettings
from strop.durable import JsonLines
from strop.engine.evaluation_contract import Evaluator, Watcher
from strop.engine.step_source import GroupSet, Part, Supply
from strop.errors import TrainingError
from strop.objectives.base import FetchedMean, Objective
from strop.plan.order import Plan
from strop.policy.policy import Policy
from strop.rollout.collect import Collected, Collector, Rewarded, ScoreGroups, joined, measured
from strop.rollout.comparing import by_length, compared
from strop.rollout.drawn_ahead import Drawn, DrawnAhead
from strop.rollout.forecast import Probe
from strop.rollout.held_out import HeldOut, Losses
from strop.rollout.rewarding import Failures
from strop.world import World

ADVANTAGES = "advantages"


class RolloutSource:
    """Samples the groups of a round when the first of its steps is asked for.

    Args:
        held_out: samples for the prompts that the policy is evaluated on, if there are any.
        log: the file to which every sampled group is written. note: called with a message about rewards that fail.
        refills: how many times a step samples further prompts in place of groups without signal; None: it keeps these,
            or, where pairs are trained, leaves them out.
        temperature: that of sampling, which is written down beside the log-probs.
        objective: says which columns the policy has to supply, and derives the advantages that are written down.
        losses: the loss of what is sampled for held-out prompts, where it is measured. probe: what forecasts the groups
            without signal, where that is asked for.
        also_close: called when nothing is sampled any more. staleness: how many steps old the weights are that sample;
            above 0, while the steps between train, by `policy`.
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
        *,
        refills: int | None = None,
        temperature: float,
        objective: Objective[MethodSettings],
        losses: Losses | None = None,
        probe: Probe | None = None,
        also_close: Callable[[], None] = lambda: None,
        staleness: int = 0,
        policy: Policy | None = None,
    ) -> None:
        self._also_close, self.probe = also_close, probe
        self.plan, self.num_steps = plan, plan.num_steps
        self._collector, self._held_out = collector, held_out
        self.supplies, self._losses = collector.supplies, losses
        self._objective, self._wants = objective, objective.reads & Policy.SUPPLIES
        self._has_advantages = ADVANTAGES in objective.derives
        self._note, self._log, self._world = note, JsonLines(log), world
        self._temperature = temperature
        self._refills = 0 if refills is None and collector.pairs else refills
        self._drawn_ahead: DrawnAhead | None = None
        if staleness:
            assert policy is not None and world.size == 1
            self._drawn_ahead = DrawnAhead(plan, staleness, policy, collector.prepare, self._draw, self._score)
        self._round: dict[int, list[Rewarded]] = {}  # by the step that they are trained on first
        self._made: tuple[int, GroupSet, dict[str, FetchedMean]] | None = None
        self._made_at = 0.0
        self._last = 0  # the last step that is done
        self._has_warned = False

    def step(self, step: int) -> GroupSet:
        if self._made is None or self._made[0] != step:
            self._made = (step, *self._make(step))
            self._made_at = time.perf_counter()
        return self._made[1]

    def metrics(self, step: int) -> Mapping[str, FetchedMean]:
        assert self._made is not None and self._made[0] == step
        return self._made[2]

    def place(self, step: int) -> tuple[int, int]:
        return self.plan.position(step)

    def epochs(self, step: int) -> float:
        return step / self.plan.steps_per_epoch

    def evaluator(self, watcher: Watcher, should_stop: Callable[[], bool]) -> Evaluator | None:
        settle = self._drawn_ahead.settle if self._drawn_ahead is not None else lambda: None
        return None if self._held_out is None else HeldOut(self._held_out, watcher, should_stop, self._losses, settle)

    def after(self, step: int) -> None:
        """Notes how long the step trained. The next one is sampled with the weights it has when it is asked for."""
        assert self._made is not None and self._made[0] == step
        self._made[2]["time/train"] = (time.perf_counter() - self._made_at, 1)
        self._last = step

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def state(self) -> Mapping[str, Any]:
        """The groups of the round, if a step of it is still to come, and what was drawn ahead."""
        groups = self._round if self._last and self._is_within_round(self._last) else {}
        ahead = {} if self._drawn_ahead is None else self._drawn_ahead.state()
        if not groups and not ahead:
            return {}
        return {
            "after": self._last,
            "round": {str(step): [r.as_json() for r in rewarded] for step, rewarded in groups.items()},
            "ahead": ahead,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        prompts, self._last = self._collector.prompts, state.get("after", 0)
        self._round = {
            int(step): [Rewarded.from_json(of, prompts[of["number"]]) for of in rewarded]
            for step, rewarded in state.get("round", {}).items()
        }
        if self._drawn_ahead is not None:
            self._drawn_ahead.restore(state.get("ahead", {}), prompts)

    def rewind(self, step: int) -> None:
        """Removes the groups that a run resumed after `step` samples again from the log."""
        kept = self.plan.round(step)[-1] if step and self._is_within_round(step) else step
        if self._world.is_main and self._log.path.exists():
            self._log.retain(lambda record: record["step"] <= kept if isinstance(record.get("step"), int) else None)

    def _is_within_round(self, step: int) -> bool:
        """Whether the step after this one trains on what was sampled for this one's round."""
        return step < self.num_steps and self.plan.round(step) == self.plan.round(step + 1)

    def close(self) -> None:
        if self._drawn_ahead is not None:
            self._drawn_ahead.close()
        self._also_close()
        self._collector.close()
        self._log.close()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _make(self, step: int) -> tuple[GroupSet, dict[str, FetchedMean]]:
        metrics: dict[str, FetchedMean] = dict.fromkeys(self._collector.phases, (0.0, 1))
        first = self.plan.first_time(step)
        if self._drawn_ahead is not None:
            self._drawn_ahead.begin(step)
        if first not in self._round:
            steps = [s for s in self.plan.round(step) if s <= self.num_steps]
            self._round = {
                s: self._noted(s, drawn, metrics) for s, drawn in zip(steps, self._sampled(steps), strict=True)
            }
        return _group_set(self._round[first], self._wants), metrics

    def _sampled(self, steps: Sequence[int]) -> Iterator[Drawn]:
        """What is sampled for the steps of a round."""
        if self._drawn_ahead is not None:
            yield from self._drawn_ahead.take(steps[0])
            return
        for step in steps:
            drawn = self._draw(step, self._collector.prepare())
            self._score(step, drawn)
            yield drawn

    def _draw(self, step: int, use: Callable[[], None]) -> Drawn:
        """What is sampled and rewarded for a step; in a thread, where it is drawn ahead."""
        numbers = self.plan.groups(step)
        done = self._collector.draw(step, numbers, use)
        return Drawn(done, 0 if self._refills is None else self._refill(step, numbers, done, use))

    def _score(self, step: int, drawn: Drawn, sampled_with: ScoreGroups | None = None) -> None:
        self._collector.score(step, drawn.done, sampled_with)

    def _trained(self, rewarded: list[Rewarded]) -> list[Rewarded]:
        """The groups that teach something; if none does, all groups, or none where pairs are trained."""
        if self._refills is None:
            return rewarded
        return [r for r in rewarded if r.has_signal] or ([] if self._collector.pairs else rewarded)

    def _noted(self, step: int, drawn: Drawn, metrics: dict[str, FetchedMean]) -> list[Rewarded]:
        """The groups that a step trains, after all that was drawn is written down. metrics: those of the step that
        waits for it; these are added."""
        done, refilled = drawn
        trained = self._trained(done.rewarded)
        self._warn_once(step, done.failures)
        if not done.rewarded:
            raise TrainingError(
                f"no prompt of this step has rewards: {done.failures.first}",
                where=f"step {step}",
                fix="mend the rewards, or set rollout.on_reward_error: value",
            )
        advantages = self._advantages(trained)
        if self._world.is_main:
            for r in done.rewarded:
                self._log.append(self._line(step, r, advantages.get(id(r))))
        if not trained:
            raise TrainingError(
                f"no pair can be made: the rewards of all completions of each of {len(done.rewarded)} prompts are the "
                "same",
                where=f"step {step}",
                expected="prompts some of whose completions are better than others",
                fix="look at rollouts.jsonl; choose other rewards or prompts, or raise rollout.num_generations",
            )
        found = measured(done.rewarded, done.failures, self._collector.reward_names)
        found |= by_length([r.rewards.compared for r in done.rewarded], [r.lengths for r in done.rewarded])
        if self._refills is not None:
            dropped = sum(not r.has_signal for r in done.rewarded)
            found |= {"rollout/groups_without_signal": (float(dropped), 1), "rollout/refilled": (float(refilled), 1)}
        if self._collector.pairs:
            found |= compared([r.rewards.total for r in done.rewarded])
            lengths = [n for r in done.rewarded for n in r.lengths]
            found["completions/mean_length"] = (float(sum(lengths)), len(lengths))
        for name, seconds in done.seconds.items():
            found[name] = (seconds, 0)  # there is one already, of this step
        for name, (total, count) in found.items():
            before = metrics.get(name, (0.0, 0))
            metrics[name] = (before[0] + total, before[1] + count)
        return trained

    def _refill(self, step: int, numbers: Sequence[int], done: Collected, use: Callable[[], None]) -> int:
        """Samples further prompts in place of those without signal, and adds them to `done`. Returns how many."""
        assert self._refills is not None
        own = set(numbers)
        order = np.random.default_rng([self.plan.seed, 0x66696C6C, step]).permutation(len(self._collector.prompts))
        spare, used = [n for n in order.tolist() if n not in own], 0
        kept, refills = [r for r in done.rewarded if r.has_signal], 0
        while refills < self._refills or (self._collector.pairs and not kept):
            some = spare[used : used + len(numbers) - len(kept)]
            if not some:
                break
            done.add(self._collector.draw(step, some, use))
            used, refills = used + len(some), refills + 1
            kept = [r for r in done.rewarded if r.has_signal]
        return used

    def _warn_once(self, step: int, failures: Failures) -> None:
        if failures.counts and not self._has_warned:
            self._has_warned = True
            self._note(f"step {step}: {failures.first}; further ones are counted in rewards/failed")

    def _advantages(self, trained: Sequence[Rewarded]) -> dict[int, list[float]]:
        """Those of the completions of each group that a step trains, by its id; the mean where tokens have their own.
        Nothing where the objective derives none."""
        if not self._has_advantages or not trained:
            return {}
        found = _group_set(trained, self._wants).derived(self._objective).columns[ADVANTAGES]
        of_groups = (found([place]).find(ADVANTAGES).tolist() for place in range(len(trained)))
        return {
            id(r): [fmean(own) for own in _split(values, r.lengths)]
            for r, values in zip(trained, of_groups, strict=True)
        }

    def _line(self, step: int, rewarded: Rewarded, advantages: Sequence[float] | None) -> dict[str, Any]:
        """A group as a row of a file that can be trained on as it is. advantages: null where it is not trained."""
        completions, prompt = rewarded.completions, rewarded.prompt
        whole = rewarded
        if rewarded.trained is not None:  # all completions; those of the pair, if there is one, alone were scored again
            whole = replace(rewarded, trained=None, old_logps=None)
        group = whole.group
        line = {
            "step": step,
            "prompt_number": rewarded.number,
            "where": str(prompt.origin),
            "prompt": self._collector.text(prompt.prompt_ids),
            "texts": list(rewarded.texts),
            **_rewards(rewarded),
            "ended": [c.ended for c in completions],
            "prompt_ids": list(prompt.prompt_ids),
            "completion_ids": [list(c.ids) for c in completions],
        }
        if self._has_advantages:
            line[ADVANTAGES] = advantages
        line["sampling_temperature"] = self._temperature
        for name in ("old_logps", "sampler_logps"):
            if name in group.numbers:
                line[name] = _split(group.numbers[name], rewarded.lengths)
        if rewarded.trained is not None:
            line["pair"] = list(rewarded.trained) or None
        return line


def _rewards(rewarded: Rewarded) -> dict[str, Any]:
    """The rewards of a group as they stand in a line, where there are any."""
    if not rewarded.rewards.each:
        return {}
    by_name = {name: list(values) for name, values in rewarded.rewards.each.items()}
    found = {"rewards": list(rewarded.rewards.total), "rewards_by_name": by_name}
    if rewarded.rewards.normalised is not None:
        found["normalised_rewards"] = list(rewarded.rewards.normalised)
    return found


def _split(values: Sequence[float], lengths: Sequence[int]) -> list[list[float]]:
    found, at = [], 0
    for length in lengths:
        found.append(list(values[at : at + length]))
        at += length
    return found


def _group_set(rewarded: Sequence[Rewarded], wants: frozenset[str]) -> GroupSet:
    """The groups of a step, with the log-probs of the reference where there is one."""
    references = [r.ref_logps for r in rewarded if r.ref_logps is not None]
    columns: dict[str, Supply] = {}

    def ref_logps(part: Part) -> Columns:
        return Columns(per_token={"ref_logps": joined(references, part)})

    if references:
        columns["ref_logps"] = ref_logps
    return GroupSet([r.group for r in rewarded], columns, wants=wants, indices=[r.number for r in rewarded])
