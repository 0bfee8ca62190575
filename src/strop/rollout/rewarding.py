"""Completions to rewards: calls every reward, adds them up by weight, counts those that fail. Floor 4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from strop.config.sections import RewardSection, RolloutSection
from strop.data.store.table import KeptRow
from strop.data.text.message_forms import Tools
from strop.errors import TrainingError
from strop.machine import installed_memory
from strop.objectives.advantages import normalised_sum
from strop.rewards.calls import RewardCall, RewardCaller
from strop.rewards.lookup import MODEL_PREFIX
from strop.rollout.reward_model import RewardModel
from strop.types import LARGEST, Origin


@dataclass(frozen=True)
class Scored:
    """The rewards of a prompt's completions. total: the weighted sum of each completion. each: the values of every
    reward, by its name. normalised: the weighted sum of the rewards, each normalised over the group, where that is
    trained on."""

    total: tuple[float, ...]
    each: Mapping[str, tuple[float, ...]]
    normalised: tuple[float, ...] | None = None

    @property
    def compared(self) -> tuple[float, ...]:
        """What tells the completions apart: the total, or what is trained on in its place."""
        return self.total if self.normalised is None else self.normalised


@dataclass
class Failures:
    """How many completions each reward gave no number for, by its name; and the first failure in words."""

    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, others: Failures) -> None:
        self.counts += others.counts
        self.first = self.first or others.first


class Scorer:
    """Rewards completions, one prompt at a time.

    Args:
        names: what each reward is called in metrics. device: of reward models. normalises: whether each reward is
            normalised over its group, too.

    Raises:
        ConfigError, ModelError: as `RewardCaller` and `RewardModel`.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSection],
        names: Sequence[str],
        how: RolloutSection,
        device: torch.device,
        *,
        normalises: bool = False,
    ) -> None:
        self.names, self.normalises = tuple(names), normalises
        self._weights = [reward.weight for reward in rewards]
        self._how = how
        self._models: dict[int, RewardModel] = {}
        called = []
        for place, reward in enumerate(rewards):
            if reward.name.startswith(MODEL_PREFIX):
                name = reward.name.removeprefix(MODEL_PREFIX)
                self._models[place] = RewardModel(name, device)
            else:
                called.append((reward.name, reward.settings))
        self._places = [place for place in range(len(rewards)) if place not in self._models]
        self._caller = RewardCaller(called, how.reward_timeout, _memory(how)) if called else None

    def close(self) -> None:
        """End the process that calls the rewards."""
        if self._caller is not None:
            self._caller.close()

    def score(
        self,
        prompt: str,
        completions: Sequence[str],
        num_tokens: Sequence[int],
        row: KeptRow,
        origin: Origin,
        failures: Failures,
    ) -> Scored | None:
        """The rewards, or None where the group is to be left out.

        Args:
            prompt: as text. row: the prompt's row, whose columns rewards get by their names.
            failures: those of this group are added here.

        Raises:
            TrainingError: a reward fails under on_reward_error stop.
            ConfigError: a reward does not fit the rows.
        """
        n = len(completions)
        columns = {name: [value] * n for name, value in row.columns.items()}
        given = {
            "prompts": [prompt] * n,
            "completions": list(completions),
            "chats": [_chat(row, prompt, completion) for completion in completions],
            "num_tokens": list(num_tokens),
        }
        each: dict[str, tuple[float, ...]] = {}
        left_out = False
        for number, name in enumerate(self.names):
            call = self._call(number, given, columns, row.tools)
            missing = sum(value is None for value in call.values)
            if missing:
                why = call.error or f"it gave no finite number for {missing} of {n} completions"
                self._fail(name, missing, why, origin, failures)
                left_out = left_out or self._how.on_reward_error == "skip_group"
            each[name] = tuple(self._how.reward_error_value if v is None else v for v in call.values)
        if left_out:
            return None
        if not each:
            return Scored((0.0,) * n, {})
        by_completion = zip(*each.values(), strict=True)
        total = tuple(sum(w * v for w, v in zip(self._weights, values, strict=True)) for values in by_completion)
        normalised = normalised_sum([*each.values()], self._weights) if self.normalises else None
        return Scored(total, each, normalised)

    def _call(
        self, place: int, given: Mapping[str, Any], columns: Mapping[str, Sequence[Any]], tools: Tools
    ) -> RewardCall:
        """The reward at this place of the list, for the completions of one prompt."""
        if place in self._models:
            values, why = self._models[place].values(given["chats"], tools)
            return RewardCall(tuple(values), why)
        assert self._caller is not None
        return self._caller.values(self._places.index(place), given, columns)

    def _fail(self, name: str, missing: int, why: str, origin: Origin, failures: Failures) -> None:
        failures.counts[name] += missing
        failures.first = failures.first or f"reward {name} fails: {why} ({origin})"
        if self._how.on_reward_error == "stop":
            raise TrainingError(
                f"reward {name} fails: {why}",
                where=str(origin),
                expected=f"a finite number for every completion, of a size of at most {LARGEST:g}",
                fix="mend it, or set rollout.on_reward_error: skip_group or value, which count such completions",
            )


def _memory(how: RolloutSection) -> int | None:
    """Bytes that the process of the rewards may use."""
    if how.reward_memory_gib is not None:
        return int(how.reward_memory_gib * 2**30)
    installed = installed_memory()
    return None if installed is None else installed // 2


def _chat(row: KeptRow, prompt: str, completion: str) -> list[Mapping[str, Any]]:
    """The turns of the prompt, one of a user where it is no conversation, and the completion."""
    turns = row.prompt if isinstance(row.prompt, list) else [{"role": "user", "content": row.prompt or prompt}]
    return [*turns, {"role": "assistant", "content": completion}]
