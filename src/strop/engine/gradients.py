"""The gradients of a step, summed over all processes, in micro-batches as small as the memory requires. Floor 3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.engine.out_of_memory import attempt_together, cut_finer, decided_by_auto, does_not_fit, recomputing
from strop.engine.prefetch import Prefetch
from strop.engine.recipe import cut_matters
from strop.engine.step import StepScores, forward_backward
from strop.engine.step_source import Cut, MicroBatches, StepSource
from strop.objectives.base import Objective
from strop.policy.gradient_checkpointing import checkpoint_all
from strop.policy.policy import Policy
from strop.world import World


@dataclass(frozen=True)
class Passes:
    """What the forward and backward passes of a step gave, besides the gradients.

    result: the scores of the whole step. own: the micro-batches of this process. order: for each group in `result`, its
    place in the step's set of groups. num_tokens: tokens fed to the model by all processes.
    """

    result: StepScores
    own: MicroBatches
    order: list[int]
    num_tokens: int


class Gradients:
    """Computes the gradients of one step after the other.

    On a GPU, the micro-batches of the next step are made while the current one computes. On a CPU that would only take
    time from the step.

    Args:
        cut: how steps are first cut into micro-batches. If memory runs out, they become smaller for good.
        note: called with a line of text when that happens.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        objective: Objective[MethodSettings],
        source: StepSource,
        cut: Cut,
        world: World,
        note: Callable[[str], None],
    ) -> None:
        self._config, self._policy, self._objective = config, policy, objective
        self._source, self._cut, self._world, self._note = source, cut, world, note
        self._prefetch = Prefetch(self._micro_batches, threaded=source.ahead and world.device.type != "cpu")
        self.fitting_tokens: int | None = None
        """The size of micro-batches that fitted into memory; None as long as the first cut fits."""

    @property
    def budget_tokens(self) -> int:
        """The size that micro-batches are cut to now."""
        return self._cut.budget_tokens

    def cut_finer(self, budget_tokens: int) -> None:
        """From now on, limits micro-batches to this many tokens."""
        self._cut = replace(self._cut, budget_tokens=budget_tokens)
        self.fitting_tokens = budget_tokens

    def close(self) -> None:
        """Ends the thread that makes micro-batches."""
        self._prefetch.close()

    def take(self, step: int, scale: float | Tensor) -> Passes:
        """Computes the gradients of one step, times `scale`, summed over all processes.

        If memory runs out in one process, the gradients of the step so far are dropped, and all processes repeat the
        whole step in smaller micro-batches. It is the same step, since the cut changes nothing but the masks of
        dropout. If micro-batches are single groups already and `gradient_checkpointing` is auto, all layers are
        recomputed from then on.

        Raises:
            TrainingError: micro-batches of one group each do not fit.
        """
        while True:
            done, why = attempt_together(lambda: self._passes(step, scale), self._policy.strategy)
            if done is not None:
                break
            if not self._policy.strategy.repeats:
                raise does_not_fit(self._config, why, f"step {step}", backward=True)
            self._policy.zero_grad(set_to_none=True)
            self._make_fit(step, why)
        result, own = done
        self._policy.strategy.sum_gradients()
        order = [place for part in own.cut for place in part]
        (num_tokens,) = self._world.sum([own.num_tokens])
        return Passes(result, own, order, num_tokens)

    def _micro_batches(self, key: tuple[int, Cut]) -> MicroBatches:
        """key: the number of a step, and how it is cut."""
        step, cut = key
        groups = self._source.step(step).derived(self._objective)
        return MicroBatches.of(groups, cut, self._policy, self._world)

    def _passes(self, step: int, scale: float | Tensor) -> tuple[StepScores, MicroBatches]:
        own = self._prefetch.take((step, self._cut))
        if step < self._source.num_steps:
            self._prefetch.begin((step + 1, self._cut))
        seed = (self._config.seed, step)
        with self._policy.weights_fixed():
            parts = (self._policy, self._objective, own.batches, own.also)
            idle = partial(self._policy.strategy.idle, wants=own.groups.wants)
            return forward_backward(*parts, seed=seed, scale=scale, world=self._world, idle=idle), own

    def _make_fit(self, step: int, why: str) -> None:
        groups, before = self._source.step(step), self._cut.budget_tokens
        finer = self._cut.smaller(groups, self._world.size)
        if finer is None and decided_by_auto(self._config) and checkpoint_all(self._policy):
            self._note(recomputing(f"step {step}", why))
            return
        if finer is None:
            longest = max(group.num_tokens for group in groups.lengths)
            raise does_not_fit(self._config, why, f"step {step}", longest, backward=True)
        but = ", but for the masks of lora_dropout" if cut_matters(self._config) else ""
        self._note(cut_finer(f"step {step}", why, before, finer.budget_tokens) + but)
        self.cut_finer(finer.budget_tokens)
