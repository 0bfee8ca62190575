"""Prompts to groups with their rewards and log-probs: every process takes a share, and all get everything. Floor 4."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.data.store.table import KeptRow
from strop.engine.step_source import Cut, GroupSet
from strop.errors import TrainingError
from strop.objectives.advantages import differ
from strop.objectives.base import FetchedMean
from strop.policy.group_logps import group_logps
from strop.policy.policy import Policy
from strop.rollout.pairs import best_and_worst
from strop.rollout.rewarding import Failures, Scored, Scorer
from strop.rollout.sampler import Prompt, Sampled
from strop.types import Completion, Group
from strop.world import World

ScoreGroups = Callable[[Sequence[Sequence[Group]]], list[Tensor]]
"""Micro-batches of groups to one tensor [scored tokens] per group, in their order: their log-probs under some model."""


class Prompts(Protocol):
    """Groups whose prompts are sampled for; their completions are not looked at."""

    @property
    def rooms(self) -> np.ndarray:
        """[prompts] tokens that a completion of each has at most."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Group: ...
    def kept(self, number: int) -> KeptRow:
        """The row of a prompt, for the rewards."""


class CompletionSampler(Protocol):
    """What draws completions: the policy itself, or a server."""

    def prepare(self) -> Callable[[], None]:
        """Called by all processes while the weights are those to sample with. What it returns is called before
        sampling, which may be later, in another thread."""

    def sample(self, step: int, prompts: Sequence[Prompt], /) -> list[list[Sampled]]:
        """The completions of each prompt, in the order of the prompts. What is drawn depends on the step, the prompt's
        number and the weights."""


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What was sampled for one prompt.

    number: of the prompt among all. texts: the completions, without special tokens. trained: places of the completions
    that are trained, in this order; None: all, as they were sampled. ref_logps: [scored tokens] of the trained
    completions under the reference, where there is one. old_logps: the same by the forward pass of training, where that
    scores them, too.
    """

    number: int
    prompt: Group
    completions: Sequence[Sampled]
    texts: Sequence[str]
    rewards: Scored
    trained: tuple[int, ...] | None = None
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None

    @property
    def has_signal(self) -> bool:
        """Whether comparing its completions teaches anything."""
        return differ(self.rewards.compared)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(c.ids) for c in self.completions]

    @property
    def group(self) -> Group:
        """The prompt with the completions that are trained, and the numbers beside them."""
        places = range(len(self.completions)) if self.trained is None else self.trained
        completions = [self.completions[i] for i in places]
        made = tuple(Completion(c.ids, b"\1" * len(c.ids)) for c in completions)
        sampled = array("d", chain.from_iterable(c.logps for c in completions))
        ended = array("d", [float(c.ended) for c in completions])
        numbers = {"ended": ended, "old_logps": sampled}
        if self.rewards.each:
            numbers["rewards"] = array("d", [self.rewards.total[i] for i in places])
        if self.rewards.normalised is not None:
            numbers["normalised_rewards"] = array("d", [self.rewards.normalised[i] for i in places])
        if self.old_logps is not None:
            numbers |= {"old_logps": array("d", self.old_logps.double().tolist()), "sampler_logps": sampled}
        return Group(self.prompt.prompt_ids, made, self.prompt.origin, numbers=numbers)

    def as_json(self) -> dict[str, Any]:
        """Everything but the prompt itself, for a checkpoint."""
        rewards = [list(self.rewards.total), {name: list(x) for name, x in self.rewards.each.items()}]
        if self.rewards.normalised is not None:
            rewards.append(list(self.rewards.normalised))
        tensors = {"ref_logps": self.ref_logps, "old_logps": self.old_logps}
        return {
            "number": self.number,
            "completions": [[list(c.ids), list(c.logps), c.ended, c.entropy] for c in self.completions],
            "texts": list(self.texts),
            "rewards": rewards,
            "trained": None if self.trained is None else list(self.trained),
            **{name: None if x is None else [str(x.dtype), x.tolist()] for name, x in tensors.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], prompt: Group) -> Rewarded:
        completions = [Sampled(array("i", i), array("d", x), *rest) for i, x, *rest in found["completions"]]
        total, each, *normalised = found["rewards"]
        rewards = Scored(tuple(total), {name: tuple(x) for name, x in each.items()}, *map(tuple, normalised))

        def tensor(name: str) -> Tensor | None:
            if found[name] is None:
                return None
            dtype, values = found[name]
            return torch.tensor(values, dtype=getattr(torch, dtype.removeprefix("torch.")))

        trained = found.get("trained")  # checkpoints of before pairs could be sampled have none
        places = None if trained is None else tuple(trained)
        parts = (found["number"], prompt, completions, found["texts"], rewards, places)
        return cls(*parts, ref_logps=tensor("ref_logps"), old_logps=tensor("old_logps"))


@dataclass
class Collected:
    """What was sampled for some prompts, in their order; a prompt is not in it if its rewards failed and it is left
    out. seconds: by phase, those of the slowest process."""

    rewarded: list[Rewarded] = field(default_factory=list)
    failures: Failures = field(default_factory=Failures)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, more: Collected) -> None:
        """What was sampled for further prompts."""
        self.rewarded += more.rewarded
        self.failures.add(more.failures)
        self.seconds = {name: self.seconds.get(name, 0.0) + more.seconds[name] for name in more.seconds}

    def as_json(self) -> dict[str, Any]:
        """Everything but the prompts themselves, for a checkpoint."""
        failures = [dict(self.failures.counts), self.failures.first]
        return {"rewarded": [r.as_json() for r in self.rewarded], "failures": failures, "seconds": self.seconds}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], prompts: Prompts) -> Collected:
        rewarded = [Rewarded.from_json(of, prompts[of["number"]]) for of in found["rewarded"]]
        counts, first = found["failures"]
        return cls(rewarded, Failures(Counter(counts), first), dict(found["seconds"]))


class Collector:
    """Samples, rewards and scores.

    Args:
        reference: scores under the reference, where the objective reads it. policy: scores what was sampled again, by
            the forward pass of training, where the objective compares that with the sampler. cut: how groups are cut
            into micro-batches for both. pairs: train on the best and the worst completion of each prompt. Prompts
            whose completions all have the same reward then train none, and are not scored. most_apart: the mean
            difference of the two log-probs, in nats per token, above which the sampler is taken to draw from another
            model; None: it is not looked at.
    """

    def __init__(
        self,
        prompts: Prompts,
        sampler: CompletionSampler,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        world: World,
        cut: Cut,
        *,
        reference: ScoreGroups | None = None,
        policy: Policy | None = None,
        pairs: bool = False,
        most_apart: float | None = None,
    ) -> None:
        self._most_apart = most_apart
        self._prompts, self._rooms = prompts, prompts.rooms
        self._sampler, self._scorer, self._tokenizer = sampler, scorer, tokenizer
        self.world, self._cut, self._reference, self._policy = world, cut, reference, policy
        self.pairs = pairs

    @property
    def prompts(self) -> Prompts:
        return self._prompts

    @property
    def reward_names(self) -> Sequence[str]:
        return self._scorer.names

    @property
    def supplies(self) -> frozenset[str]:
        """Names of the columns that come with what is collected."""
        again = {"sampler_logps"} if self._policy is not None else set()
        reference = {"ref_logps"} if self._reference is not None else set()
        rewards = {"rewards"} if self.reward_names else set()
        rewards |= {"normalised_rewards"} if self._scorer.normalises else set()
        return frozenset({"ended", "old_logps"} | rewards | again | reference)

    @property
    def phases(self) -> Sequence[str]:
        """Names of the times that collecting takes."""
        scores = self._reference is not None or self._policy is not None
        return ("time/sample", "time/reward", *(["time/score"] if scores else []))

    def close(self) -> None:
        """End the process that calls the rewards."""
        self._scorer.close()

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def collect(self, step: int, numbers: Sequence[int]) -> Collected:
        """Samples, rewards and scores with the current weights. Every process takes a share, and all get everything.

        Raises:
            TrainingError, ConfigError: as `draw` and `score`.
        """
        done = self.draw(step, numbers, self.prepare())
        self.score(step, done)
        return done

    def prepare(self) -> Callable[[], None]:
        """What `draw` needs to sample with the current weights."""
        return self._sampler.prepare()

    def draw(self, step: int, numbers: Sequence[int], use: Callable[[], None]) -> Collected:
        """Samples and rewards. Where a server samples, reward models are the only models that run in this process.

        Args:
            use: of `prepare`.

        Raises:
            TrainingError, ConfigError: as `Scorer.score` and the sampler.
        """
        shares = self.world.gather(self._share(step, self.world.own_share(numbers), use))
        whole = Collected(seconds={name: max(s.seconds[name] for s in shares) for name in shares[0].seconds})
        for share in shares:
            whole.failures.add(share.failures)
        place = {number: i for i, number in enumerate(numbers)}
        whole.rewarded = sorted((r for s in shares for r in s.rewarded), key=lambda r: place[r.number])
        return whole

    def score(self, step: int, done: Collected, sampled_with: ScoreGroups | None = None) -> None:
        """Adds the log-probs under the reference, and under the training forward, where these are compared.

        Args:
            sampled_with: the training forward with the weights that sampled; None: the current ones.

        Raises:
            TrainingError: the sampler draws from another model.
        """
        if "time/score" not in self.phases:
            return
        seconds: dict[str, float] = {}
        with _timed(seconds, "time/score"):
            own = self.world.own_share(range(len(done.rewarded)))
            scored = self._scored([done.rewarded[i] for i in own], sampled_with)
        shares = self.world.gather((dict(zip(own, scored, strict=True)), seconds["time/score"]))
        by_place = {i: rewarded for share, _ in shares for i, rewarded in share.items()}
        done.rewarded = [by_place[i] for i in range(len(done.rewarded))]
        done.seconds["time/score"] = max(took for _, took in shares)
        if self._most_apart is not None:
            _check_agreement(done.rewarded, self._most_apart, step)

    def _share(self, step: int, numbers: Sequence[int], use: Callable[[], None]) -> Collected:
        done = Collected()
        prompts = [self._prompts[number] for number in numbers]
        with _timed(done.seconds, "time/sample"):
            use()
            asked = [Prompt(n, p.prompt_ids, int(self._rooms[n])) for n, p in zip(numbers, prompts, strict=True)]
            sampled = self._sampler.sample(step, asked)
        with _timed(done.seconds, "time/reward"):
            for number, prompt, completions in zip(numbers, prompts, sampled, strict=True):
                texts = [self.text(c.ids) for c in completions]
                lengths = [len(c.ids) for c in completions]
                row, asked_for = self._prompts.kept(number), self.text(prompt.prompt_ids)
                scored = self._scorer.score(asked_for, texts, lengths, row, prompt.origin, done.failures)
                if scored is not None:
                    trained = best_and_worst(scored.total) if self.pairs else None
                    done.rewarded.append(Rewarded(number, prompt, completions, texts, scored, trained))
        return done

    def _scored(self, rewarded: Sequence[Rewarded], sampled_with: ScoreGroups | None) -> list[Rewarded]:
        """With the log-probs under the reference, and under the forward pass of training. A process without groups
        takes part in the passes of the others."""
        trained = [i for i, r in enumerate(rewarded) if r.trained != ()]
        groups = [rewarded[i].group for i in trained]
        parts = self._cut.parts(GroupSet(groups)) if groups else []
        micro_batches = [[groups[i] for i in part] for part in parts]
        places = [trained[i] for i in chain.from_iterable(parts)]
        old: dict[int, Tensor] = {}
        ref: dict[int, Tensor] = {}
        if self._policy is not None:
            again = group_logps(self._policy, micro_batches) if sampled_with is None else sampled_with(micro_batches)
            old = dict(zip(places, again, strict=True))
        if self._reference is not None:
            ref = dict(zip(places, self._reference(micro_batches), strict=True))
        return [replace(r, old_logps=old.get(i), ref_logps=ref.get(i)) for i, r in enumerate(rewarded)]


def _check_agreement(rewarded: Sequence[Rewarded], most: float, step: int) -> None:
    """Refuses completions whose log-probs the sampler and the training forward tell too far apart.

    Raises:
        TrainingError: it draws from other weights, or its log-probs mean something else.
    """
    scored = [r.group.numbers for r in rewarded if r.old_logps is not None]
    if not scored:
        return
    again, sampled = (np.concatenate([np.asarray(n[name]) for n in scored]) for name in ("old_logps", "sampler_logps"))
    apart = float(np.abs(again - sampled).mean())
    if not apart <= most:
        raise TrainingError(
            f"log-probs of the sampler and of training are {apart:.3g} nats per token apart, on average",
            where=f"step {step}",
            expected=f"at most {most:g} (rollout.vllm_max_logp_difference): the same model, weights and temperature",
            fix="let the server serve the base model of this run, in its precision and with the same "
            "rotary and quantisation settings",
        )


def joined(of_groups: Sequence[Tensor], part: Sequence[int]) -> Tensor:
    """The tensors of the groups at these places, one behind the other."""
    return torch.cat([of_groups[i] for i in part])


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def measured(rewarded: Sequence[Rewarded], failures: Failures, names: Sequence[str]) -> dict[str, FetchedMean]:
    """What sampling and rewards are measured by, as (sum, count)."""
    completions = [c for r in rewarded for c in r.completions]
    done = [len(c.ids) for c in completions if c.ended]
    metrics: dict[str, FetchedMean] = {
        "completions/clipped_ratio": (float(len(completions) - len(done)), len(completions)),
        "completions/mean_terminated_length": (float(sum(done)), len(done)),
        "rewards/failed": (float(failures.counts.total()), 1),
    }
    entropies = [c.entropy for c in completions if c.entropy is not None]
    if len(entropies) == len(completions):
        metrics["entropy"] = (sum(entropies), sum(len(c.ids) for c in completions))
    for name in names:
        values = [v for r in rewarded for v in r.rewards.each[name]]
        mean = sum(values) / len(values) if values else 0.0
        metrics[f"rewards/{name}/mean"] = (sum(values), len(values))
        if len(values) > 1:
            spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
            metrics[f"rewards/{name}/std"] = (spread**0.5, 1)
    return metrics
