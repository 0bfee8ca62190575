"""Rounds of steps that are drawn while earlier steps train, with the weights that were there when it began. Floor 4.

With staleness S, the round that begins with step f is drawn with the weights after step f - 1 - S, in a thread, one
round after the other. What is drawn is scored when it is asked for, by the weights that drew it: a copy of those that
train takes their place for that pass. So ratios compare with the policy that sampled, however old it is.

After a step n, rounds that were begun before cannot be drawn again, since their weights are gone: a checkpoint waits
for them and holds them. The one that was begun after step n is drawn again from the weights of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

from strop.plan.order import Plan
from strop.policy.policy import Policy
from strop.policy.reference_models import FrozenReference
from strop.rollout.collect import Scoring

Drawn = TypeVar("Drawn")
Use = Callable[[], None]


class _Begun(NamedTuple, Generic[Drawn]):
    """A round that is being drawn with the weights after step `after`."""

    after: int
    future: Future[list[Drawn]]
    weights: FrozenReference


class DrawnAhead(Generic[Drawn]):
    """Draws rounds ahead.

    Args:
        staleness: S, at least 1. prepare: gives what lets `draw` sample with the current weights. draw: a step, drawn.
        score: adds the log-probs of a step that is drawn, under the weights that are given.
    """

    def __init__(
        self,
        plan: Plan,
        staleness: int,
        policy: Policy,
        prepare: Callable[[], Use],
        draw: Callable[[int, Use], Drawn],
        score: Callable[[int, Drawn, Scoring], None],
    ) -> None:
        self._plan, self._staleness, self._policy = plan, staleness, policy
        self._prepare, self._draw, self._score = prepare, draw, score
        self._pool = ThreadPoolExecutor(1, "strop-rollouts")
        self._begun: dict[int, _Begun[Drawn]] = {}  # by the first step of their round
        self.done: dict[int, list[Drawn]] = {}
        """Rounds that are drawn and scored, and not taken yet."""
        self._began_after: int | None = None

    def begin(self, after: int) -> None:
        """Begins to draw what is due with the current weights, which are those after this step; once for each step."""
        if self._began_after == after:
            return
        self._began_after = after
        newest = after + 1 + self._staleness
        due = [newest] if after else range(1, newest + 1)
        for first in (f for f in due if f <= self._plan.num_steps and self._plan.round(f).start == f):
            if first == self._plan.first_time(first) and first not in self.done:
                use, weights = self._prepare(), FrozenReference(self._policy)
                steps = [s for s in self._plan.round(first) if s <= self._plan.num_steps]
                self._begun[first] = _Begun(after, self._pool.submit(self._all, steps, use), weights)

    def _all(self, steps: Sequence[int], use: Use) -> list[Drawn]:
        return [self._draw(step, use) for step in steps]

    def take(self, first: int) -> list[Drawn]:
        """The steps of a round, drawn and scored.

        Raises:
            TrainingError, ConfigError: as `draw` and `score`.
        """
        self._finish(first)
        return self.done.pop(first)

    def finish_older(self, than: int) -> None:
        """Waits for all rounds that are drawn with weights from before this step, and scores them."""
        for first in [f for f, begun in self._begun.items() if begun.after < than]:
            self._finish(first)

    def settle(self) -> None:
        """Waits until nothing is drawn."""
        wait([begun.future for begun in self._begun.values()])

    def close(self) -> None:
        """Draws nothing any more, and waits for what is being drawn."""
        self._pool.shutdown(cancel_futures=True)

    def _finish(self, first: int) -> None:
        if first in self.done:
            return
        begun = self._begun.pop(first)
        drawn = begun.future.result()
        for step, one in zip(self._plan.round(first), drawn, strict=False):
            self._score(step, one, begun.weights.logps)
        self.done[first] = drawn
