"""The step source that samples: one process or several make the same groups."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build_tokenizer
from group_papers import advantages as papers_advantages
from strop.batch import own_columns, structure_of
from strop.config.methods import GrpoSettings
from strop.config.sections import RolloutSection
from strop.data.store.table import KeptRow
from strop.engine.step_source import Cut
from strop.errors import TrainingError
from strop.objectives.advantages import normalised_sum
from strop.objectives.base import build_objective
from strop.plan.order import Plan
from strop.plan.row_tokens import packed_tokens
from strop.rollout.collect import Collector, Rewarded
from strop.rollout.comparing import by_length
from strop.rollout.rewarding import Failures, Scored
from strop.rollout.rollout_source import RolloutSource
from strop.rollout.sampler import Prompt, Sampled
from strop.types import Completion, Group, Origin
from strop.world import World
from worlds import in_worlds

PROMPTS = [
    Group(array("i", [5 + i] * (1 + i)), (Completion(array("i", [3]), b"\1"),), Origin("rows", i)) for i in range(7)
]


class Prompts(list[Group]):
    rooms = np.full(len(PROMPTS), 8)

    def kept(self, number: int) -> KeptRow:
        return KeptRow({"value": number}, None)


class Sampling:
    """Two completions that say for what they were sampled."""

    def prepare(self) -> Callable[[], None]:
        return lambda: None

    def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
        return [
            [Sampled(array("i", [step, p.number, 40 + g]), array("d", [-0.1, -0.2, -0.3 - g]), g == 0) for g in (0, 1)]
            for p in prompts
        ]


GRPO = build_objective(GrpoSettings())


class Scoring:
    names, normalises = ("a",), False

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.fails = fails

    def score(
        self, prompt: str, completions: Any, num: Any, row: KeptRow, origin: Origin, failures: Failures
    ) -> Scored | None:
        if origin.line in self.fails:
            failures.counts["a"] += 2
            failures.first = failures.first or str(origin)
            return None
        values = (float(row.columns["value"]), 0.0)
        return Scored(values, {"a": values})

    def close(self) -> None: ...


def make(world: World, folder: Path, fails: Sequence[int] = ()) -> RolloutSource:
    return RolloutSource(
        Plan.of(7, 4, 1, None, 0),
        collector(world, Scoring(fails)),
        collector(world, Scoring(fails)),
        folder / "rollouts.jsonl",
        lambda note: None,
        world,
        temperature=0.7,
        objective=GRPO,
    )


def collector(world: World, scoring: Any, sampling: Any = None, **more: Any) -> Collector:
    parts: Any = (Prompts(PROMPTS), sampling or Sampling(), scoring, build_tokenizer(), world, Cut(10, packed_tokens))
    return Collector(*parts, **more)


def told(source: RolloutSource) -> list[Any]:
    found = []
    for step in (1, 2):
        groups = source.step(step)
        assert source.step(step) is groups, "made once"
        metrics = {k: v for k, v in source.metrics(step).items() if not k.startswith("time/")}
        found.append(([*groups.groups], [*(groups.indices or ())], metrics))
        source.after(step)
    return found


@pytest.mark.parametrize("fails", [(), (2, 5)])
def test_processes_share_the_prompts_and_all_get_all_groups(tmp_path: Path, fails: tuple[int, ...]) -> None:
    logs = []
    results = []
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        results += in_worlds(size, lambda world, folder=folder: told(make(world, folder, fails)))  # type: ignore[misc]
        logs.append((folder / "rollouts.jsonl").read_text())
    assert all(result == results[0] for result in results[1:])
    assert logs[0] == logs[1] == logs[2] and len(logs[0].splitlines()) == 7 - len(fails)
    (groups, indices, metrics), _ = results[0]
    assert [g.origin.line for g in groups] == indices and metrics["completions/clipped_ratio"] == (
        len(groups),
        2 * len(groups),
    )
    assert [list(g.completions[1].ids) for g in groups] == [[1, i, 41] for i in indices]
    assert metrics["rewards/a/mean"] == (sum(map(float, indices)), 2 * len(groups))
    better = len([i for i in indices if i])  # the first of two; those of prompt 0 are the same
    assert (
        metrics["completions/mean_length_better"] == metrics["completions/mean_length_worse"] == (3.0 * better, better)
    )
    assert metrics["rewards/length_correlation"] == (0.0, 0), "all are as long"


def test_reward_and_length_are_compared_within_groups() -> None:
    rewards = [(0.0, 1.0, 2.0), (1.0, 1.0, 1.0), (5.0, 3.0, 4.0), (0.1, 0.1, 0.4), (1e300, 0.0, -1e300)]
    lengths = [(2, 4, 6), (9, 1, 5), (1, 2, 9), (3, 3, 3), (2, 4, 6)]
    found = by_length(rewards, lengths)
    total, count = found["rewards/length_correlation"]
    between = np.corrcoef(rewards[2], lengths[2])[0, 1]
    assert count == 3 and total == pytest.approx(1 + between - 1)
    assert found["completions/mean_length_better"] == (6 + 1 + 3 + 2, 4)
    assert found["completions/mean_length_worse"] == (2 + 2 + 6 + 6, 5)
    assert by_length([(1e-300, 0.0)], [(1, 2)])["rewards/length_correlation"] == (pytest.approx(-1), 1)


def test_every_group_has_its_own_log_probs_of_the_reference(tmp_path: Path) -> None:
    """However the groups are dealt and cut: here the reference gives a group its prompt's length at every token."""

    def reference(micro_batches: Sequence[Sequence[Group]]) -> list[torch.Tensor]:
        assert all(len(part) == 1 or sum(g.num_tokens for g in part) <= 10 for part in micro_batches)
        return [torch.full((g.num_scored,), float(len(g.prompt_ids))) for part in micro_batches for g in part]

    def asked(world: World) -> Any:
        own = collector(world, Scoring([3]), reference=reference)
        source = RolloutSource(
            Plan.of(7, 4, 1, None, 0),
            own,
            None,
            tmp_path / "log.jsonl",
            lambda note: None,
            world,
            temperature=1.0,
            objective=GRPO,
        )
        assert "ref_logps" in source.supplies
        groups = source.step(1)
        assert source.metrics(1)["time/score"][0] > 0
        return [(g, groups.columns["ref_logps"]([i]).find("ref_logps").tolist()) for i, g in enumerate(groups.groups)]

    for size in (1, 3):
        for found in in_worlds(size, asked):
            assert len(found) in (3, 4)
            for group, values in found:
                assert values == [float(len(group.prompt_ids))] * group.num_scored


class Varied(Scoring):
    """Prompts of an even number have no signal, in any step."""

    def score(
        self, prompt: str, completions: Any, num: Any, row: KeptRow, origin: Origin, failures: Failures
    ) -> Scored:
        values = (0.0, float(row.columns["value"] % 2))
        return Scored(values, {"a": values})


@pytest.mark.parametrize(("refills", "size"), [(0, 1), (1, 1), (9, 1), (9, 2)])
def test_groups_without_signal_give_way_to_others(refills: int, size: int, tmp_path: Path) -> None:
    def asked(world: World) -> Any:
        parts = (Plan.of(7, 4, 1, None, 0), collector(world, Varied()), None)
        limits = {"temperature": 1.0, "refills": refills, "objective": GRPO}
        source = RolloutSource(*parts, tmp_path / "log.jsonl", lambda note: None, world, **limits)  # type: ignore[arg-type]
        found = [(source.plan.groups(step), source.step(step).indices, source.metrics(step)) for step in (1, 2)]
        source.close()
        return found

    for own in in_worlds(size, asked):
        for planned, indices, metrics in own:
            with_signal = [n for n in planned if n % 2]
            assert all(n % 2 for n in indices) and len(set(indices)) == len(indices) <= len(planned)
            assert set(with_signal) <= set(indices), "what has a signal stays"
            if refills == 9:  # there are three with a signal
                assert len(indices) == min(3, len(planned))
            if not refills:
                assert indices == with_signal and metrics["rollout/refilled"] == (0.0, 1)
            log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
            assert {n for n in planned if not n % 2} <= {row["prompt_number"] for row in log}, "all are written down"
            for row in log:  # of two completions, the second is as far above the mean as the first is below
                advantages = pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3) if row["prompt_number"] % 2 else None
                assert row["advantages"] == advantages
            assert metrics["rollout/groups_without_signal"][0] >= len(planned) - len(with_signal)


class Several(Scoring):
    """Two rewards, each normalised by itself. Prompts of an even number have no signal; the third has the same sum for
    both completions, and rewards that differ."""

    names, normalises, weights = ("a", "b"), True, (1.0, 2.0)

    def score(
        self, prompt: str, completions: Any, num: Any, row: KeptRow, origin: Origin, failures: Failures
    ) -> Scored:
        values = self.each(row.columns["value"])
        total = tuple(sum(w * v for w, v in zip(self.weights, of, strict=True)) for of in zip(*values, strict=True))
        return Scored(total, dict(zip(self.names, values, strict=True)), normalised_sum(values, self.weights))

    @staticmethod
    def each(number: int) -> tuple[tuple[float, float], tuple[float, float]]:
        return (0.0, 2.0 * (number % 2)), {1: (0.0, 1.0), 3: (1.0, 0.0), 5: (0.5, 0.0)}.get(number, (1.0, 1.0))


def test_gdpo_is_that_of_its_paper_in_any_number_of_processes_with_groups_drawn_anew(tmp_path: Path) -> None:
    settings = GrpoSettings(algorithm="gdpo")
    objective = build_objective(settings)

    def asked(world: World) -> Any:
        parts = (Plan.of(7, 4, 1, None, 0), collector(world, Several()), None)
        source = RolloutSource(
            *parts, tmp_path / "log.jsonl", lambda note: None, world, temperature=1.0, objective=GRPO, refills=9
        )
        steps = [source.step(step) for step in (1, 2)]
        source.close()
        return [
            (
                step.indices,
                objective.derive(structure_of(step.groups), own_columns(step.groups)).per_token["advantages"],
            )
            for step in steps
        ]

    alone, *shared = [found for size in (1, 2) for found in in_worlds(size, asked)]
    for (indices, own), *others in zip(alone, *shared, strict=True):
        assert set(indices) == {1, 3, 5}, "groups without signal give way; the third has one, though its sums are equal"
        step = [
            [
                {"pi": np.zeros(3), "r": 0.0, "each": each, "weights": Several.weights}
                for each in zip(*Several.each(number), strict=True)
            ]
            for number in indices
        ]
        told = np.concatenate([a for group in papers_advantages(settings, step) for a in group])
        assert own.tolist() == pytest.approx(told.tolist(), rel=1e-12)
        assert all(ids == indices and torch.equal(a, own) for ids, a in others)


def test_a_step_without_any_signal_keeps_its_groups(tmp_path: Path) -> None:
    class Same(Scoring):
        def score(self, *_: Any) -> Scored:
            return Scored((1.0, 1.0), {"a": (1.0, 1.0)})

    world = World.alone("cpu")
    parts = (Plan.of(7, 4, 1, None, 0), collector(world, Same()), None)
    source = RolloutSource(
        *parts, tmp_path / "log.jsonl", lambda note: None, world, temperature=1.0, objective=GRPO, refills=1
    )
    assert len(source.step(1).groups) >= 4 and source.metrics(1)["rollout/groups_without_signal"][0] >= 4


def test_a_round_is_sampled_once_and_survives_a_checkpoint(tmp_path: Path) -> None:
    world, plan = World.alone("cpu"), Plan.of(7, 2, 2, None, 0, steps_per_round=2, passes_per_round=2)

    def reference(micro_batches: Sequence[Sequence[Group]]) -> list[torch.Tensor]:
        return [torch.rand(g.num_scored) for part in micro_batches for g in part]

    def made() -> RolloutSource:
        own = collector(world, Scoring(), reference=reference)
        return RolloutSource(
            plan, own, None, tmp_path / "log.jsonl", lambda note: None, world, temperature=1.0, objective=GRPO
        )

    def content(source: RolloutSource, step: int) -> Any:
        found = source.step(step)
        part = range(len(found.groups))
        return [*found.groups], found.indices, found.columns["ref_logps"](part).find("ref_logps").tolist()

    source, whole = made(), {}
    for step in range(1, plan.num_steps + 1):
        whole[step] = content(source, step)
        assert whole[step] == whole[plan.first_time(step)]
        seconds = source.metrics(step)["time/sample"][0]
        assert (seconds > 0) == (step == plan.round(step).start), "the step that waits for it"
        source.after(step)
        resumed = made()
        state = json.loads(json.dumps(source.state()))
        assert bool(state) == (step < plan.num_steps and plan.round(step) == plan.round(step + 1))
        resumed.restore(state)
        assert resumed.state() == source.state(), "a checkpoint before the first step is no other"
        if state:
            kept = whole.get(plan.first_time(step + 1))
            found = content(resumed, step + 1)
            assert kept is None or found == kept
        lines = (tmp_path / "log.jsonl").read_text()
        resumed.rewind(step)
        assert (tmp_path / "log.jsonl").read_text() == lines, "nothing of the round is sampled again"
        resumed.close()


class Aging(Sampling):
    """The last token says after which step the weights were there that sampled it."""

    def __init__(self, now: int) -> None:
        self.now, self.used = now, -1

    def prepare(self) -> Callable[[], None]:
        return partial(setattr, self, "used", self.now)

    def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
        return [
            [Sampled(array("i", [*c.ids, self.used]), array("d", [*c.logps, -1.0]), c.ended) for c in own]
            for own in super().sample(step, prompts)
        ]


def ahead(plan: Plan, sampling: Sampling, folder: Path, staleness: int) -> RolloutSource:
    world, policy = World.alone("cpu"), SimpleNamespace(strategy=SimpleNamespace(trained={}))
    own = (plan, collector(world, Scoring(), sampling), None, folder / "log.jsonl", lambda note: None, world)
    return RolloutSource(*own, temperature=1.0, objective=GRPO, staleness=staleness, policy=policy)  # type: ignore[arg-type]


@pytest.mark.parametrize(("staleness", "size", "passes"), [(1, 1, 1), (3, 1, 1), (1, 2, 1), (3, 2, 2)])
def test_rounds_are_drawn_ahead_and_every_resume_has_the_same(
    staleness: int, size: int, passes: int, tmp_path: Path
) -> None:
    plan = Plan.of(7, 2, 2, None, 0, steps_per_round=size, passes_per_round=passes)
    steps, whole, states = range(1, plan.num_steps + 1), {}, {}

    def trained(source: RolloutSource, sampling: Aging, step: int) -> list[Group]:
        groups = [*source.step(step).groups]
        source.after(step)
        sampling.now = step
        return groups

    first = Aging(0)
    source = ahead(plan, first, tmp_path, staleness)
    for step in steps:
        whole[step] = trained(source, first, step)
        states[step] = json.loads(json.dumps(source.state()))
        used = {c.ids[-1] for group in whole[step] for c in group.completions}
        assert used == {max(0, plan.round(step).start - 1 - staleness)}
    source.close()
    for step in steps[:-1]:
        own = Aging(step)
        source = ahead(plan, own, tmp_path, staleness)
        source.restore(states[step])
        for later in steps[step:]:
            assert trained(source, own, later) == whole[later]
        source.close()


def test_where_a_round_fails_those_behind_it_are_not_tried(tmp_path: Path) -> None:
    """A server that is gone is waited for once."""
    asked = []

    class Gone(Sampling):
        def sample(self, step: int, prompts: Sequence[Prompt]) -> list[list[Sampled]]:
            asked.append(step)
            raise TrainingError("it is gone", where="the server")

    source = ahead(Plan.of(7, 2, 2, None, 0), Gone(), tmp_path, staleness=2)
    with pytest.raises(TrainingError, match="it is gone"):
        source.step(1)
    with pytest.raises(TrainingError, match="it is gone"):
        source.state()
    source.close()
    assert asked == [1]


class Watching:
    def evaluating(self, num_groups: int) -> Any:
        return nullcontext(lambda done: None)

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("size", [1, 2])
def test_held_out_prompts_are_measured(size: int, tmp_path: Path) -> None:
    """Mean reward over prompts with its interval; what fails is counted and left out."""

    def line(world: World) -> Any:
        evaluator = make(world, tmp_path, [2]).evaluator(Watching(), lambda: False)
        assert evaluator is not None
        return evaluator.line("now"), evaluator.names

    for found, names in in_worlds(size, line):
        means = np.array([i / 2 for i in range(7) if i != 2])
        assert found["reward"] == pytest.approx(means.mean())
        error = 1.96 * means.std(ddof=1) / 6**0.5
        assert [found["reward_low"], found["reward_high"]] == pytest.approx(
            [means.mean() - error, means.mean() + error]
        )
        assert found["rewards/failed"] == 2 and found["num_groups"] == 6 and found["completions/clipped_ratio"] == 0.5
        assert {n for n in found if not n.startswith("num_")} - {"seconds"} <= set(names)


def test_an_evaluation_that_is_stopped_has_no_result(tmp_path: Path) -> None:
    evaluator = make(World.alone("cpu"), tmp_path).evaluator(Watching(), lambda: True)
    assert evaluator is not None and evaluator.line("now") is None


def test_what_a_resume_makes_again_leaves_the_log(tmp_path: Path) -> None:
    source = make(World.alone("cpu"), tmp_path)
    told(source)
    source.rewind(1)
    steps = [json.loads(line)["step"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 1, 1]
    source.step(2)
    source.close()


def test_a_step_without_rewards_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no prompt of this step has rewards: rows:"):
        told(make(World.alone("cpu"), tmp_path, range(7)))


def test_the_defaults_sample_from_everything() -> None:
    how = RolloutSection()
    assert (how.temperature, how.top_k, how.top_p, how.min_p) == (1.0, 0, 1.0, 0.0)


@pytest.mark.parametrize("normalised", [None, (0.25, -0.25)])
def test_a_checkpoint_keeps_what_completions_are_compared_by(normalised: tuple[float, ...] | None) -> None:
    completions = [Sampled(array("i", [3, g]), array("d", [-0.5, -1.0]), True, 0.25) for g in (4, 5)]
    scored = Scored((1.0, 1.0), {"a": (1.0, 0.0), "b": (0.0, 1.0)}, normalised)
    kept = Rewarded(2, PROMPTS[2], completions, ["x", "y"], scored)
    assert Rewarded.from_json(json.loads(json.dumps(kept.as_json())), PROMPTS[2]) == kept
    assert kept.has_signal == (normalised is not None)
    assert ("normalised_rewards" in kept.group.numbers) == (normalised is not None)
