"""Rounds of steps that are drawn while earlier steps train. Floor 4.

With staleness S, the round that begins with step f is drawn from the time when step f - S begins, so with the weights
after step f - S - 1 (the first rounds: with those of the start), in one thread, one round after the other. What is
drawn is scored by the weights that drew it: a copy of those that train takes their place for that pass. So ratios
compare with the policy that sampled, however old it is.

What was begun cannot be drawn again later, since its weights are gone: a checkpoint waits for it and holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from strop.plan.order import Plan
from strop.policy.policy import Policy
from strop.policy.reference_models import FrozenReference
from strop.rollout.collect import Collected, Prompts, ScoreGroups


class Drawn(NamedTuple):
    """What was sampled for a step, and how many prompts of it in place of groups without signal."""

    done: Collected
    refilled: int

    def as_json(self) -> dict[str, Any]:
        return {**self.done.as_json(), "refilled": self.refilled}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], prompts: Prompts) -> Drawn:
        return cls(Collected.from_json(found, prompts), found["refilled"])


class _Begun(NamedTuple):
    """A round that is being drawn, and the weights that draw it."""

    future: Future[list[Drawn]]
    weights: FrozenReference


class DrawnAhead:
    """Draws rounds ahead.

    Args:
        staleness: S, at least 1. prepare: gives what lets `draw` sample with the current weights. draw: draws a step;
            called in the thread. score: adds the log-probs of a step that is drawn, under the weights that are given.
    """

    def __init__(
        self,
        plan: Plan,
        staleness: int,
        policy: Policy,
        prepare: Callable[[], Callable[[], None]],
        draw: Callable[[int, Callable[[], None]], Drawn],
        score: Callable[[int, Drawn, ScoreGroups], None],
    ) -> None:
        self._plan, self._staleness, self._policy = plan, staleness, policy
        self._prepare, self._draw, self._score = prepare, draw, score
        self._pool = ThreadPoolExecutor(1, "strop-rollouts")
        self._newest: Future[list[Drawn]] | None = None
        self._begun: dict[int, _Begun] = {}  # by the first step of their round
        self._done: dict[int, list[Drawn]] = {}  # drawn and scored, and not taken yet

    def begin(self, step: int) -> None:
        """Starts to draw the rounds that are due when this step begins and have not been started."""
        last = min(step + self._staleness, self._plan.num_steps)
        starts = [f for f in range(step, last + 1) if self._plan.round(f).start == f]
        due = [first for first in starts if first not in self._begun and first not in self._done]
        if not due:
            return
        use, weights = self._prepare(), FrozenReference(self._policy)
        for first in due:
            steps = [s for s in self._plan.round(first) if s <= self._plan.num_steps]
            self._newest = self._pool.submit(self._all, steps, use, self._newest)
            self._begun[first] = _Begun(self._newest, weights)

    def _all(self, steps: Sequence[int], use: Callable[[], None], before: Future[list[Drawn]] | None) -> list[Drawn]:
        if before is not None:
            before.result()  # there by now; where it failed, the server is not waited for a second time
        return [self._draw(step, use) for step in steps]

    def take(self, first: int) -> list[Drawn]:
        """The steps of a round, drawn and scored.

        Raises:
            TrainingError, ConfigError: as `draw` and `score`.
        """
        self._finish(first)
        return self._done.pop(first)

    def settle(self) -> None:
        """Waits until nothing is being drawn."""
        wait([begun.future for begun in self._begun.values()])

    def close(self) -> None:
        """Draws nothing any more, and waits for what is being drawn."""
        self._pool.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """Waits for all that is begun, and gives what is not taken yet, for a checkpoint.

        Raises:
            TrainingError, ConfigError: as `take`.
        """
        for first in list(self._begun):
            self._finish(first)
        return {str(first): [one.as_json() for one in drawn] for first, drawn in self._done.items()}

    def restore(self, state: Mapping[str, Any], prompts: Prompts) -> None:
        self._done = {int(first): [Drawn.from_json(one, prompts) for one in drawn] for first, drawn in state.items()}

    def _finish(self, first: int) -> None:
        if first in self._done:
            return
        begun = self._begun.pop(first)
        drawn = begun.future.result()
        for step, one in zip(self._plan.round(first), drawn, strict=False):  # the last round may be cut short
            self._score(step, one, begun.weights.logps)
        self._done[first] = drawn
