"""The training loop: step, log, evaluate, save, until the source has no more steps. Floor 3.

    for each step of the source:
        forward and backward over its micro-batches  (gradients.py, step.py)
        refuse or clip the gradient, update          (optim.py)
        emit a record of the step                    (step_records.py)
        log, evaluate, save when due                 (metrics.py, validation.py, checkpoint_saves.py)

A resume needs the weights, the optimizer and the few numbers of `TrainState`. The order of the data and the random
state of dropout are functions of the step, so they need not be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.engine.best_evaluation import deciding_value, is_best, stops_early
from strop.engine.checkpoint import Checkpoint
from strop.engine.checkpoint_saves import Saves
from strop.engine.device_memory import DeviceMemory
from strop.engine.evaluation_contract import Evaluator
from strop.engine.gradients import Gradients
from strop.engine.ledger import row_hash
from strop.engine.metrics import MetricWindow, UpdateProbe
from strop.engine.optim import build_optimizer, learning_rate, set_rate, without_gradient
from strop.engine.snapshot import Snapshot
from strop.engine.stalled_loss import StalledLoss
from strop.engine.step import StepNumbers, StepScores, check_columns, suspect_rows
from strop.engine.step_records import StepRecord, WeightsDigest
from strop.engine.step_source import Cut, StepSource
from strop.engine.train_state import TrainState
from strop.engine.validation import Validation
from strop.errors import Interrupted, TrainingError
from strop.objectives.base import FetchedMean, Objective
from strop.policy.policy import Policy
from strop.types import Group
from strop.world import World

MAX_SKIPPED_IN_A_ROW = 10
"""Non-finite steps that may be skipped in a row before a run stops."""


class Outputs(Protocol):
    """Where the loop sends its results: run folder, trackers, terminal."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: means over the steps since the last line, or an evaluation."""

    def row_losses(self, step: int, losses: NDArray[np.float64]) -> None:
        """The loss of each validation row, before the line of the evaluation."""

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], protect: Sequence[int], world: World
    ) -> Path:
        """Called by all processes, which return when it is saved. tensors: those that this process writes."""

    def evaluating(self, num_groups: int) -> AbstractContextManager[Callable[[int], None]]: ...
    def note(self, text: str) -> None: ...


class Cuts(NamedTuple):
    """How training steps and evaluations are first cut into micro-batches."""

    training: Cut
    evaluation: Cut


class _Update(NamedTuple):
    """What the optimizer did with the gradients of a step.

    numbers: loss and metrics of the step. weights: a digest of the weights before the update. moved: how far the
    weights moved, if that was measured.
    """

    numbers: StepNumbers
    weights: str
    grad_norm: float
    clipped: bool
    skipped: bool
    moved: Mapping[str, FetchedMean] = {}


class Loop:
    """Trains a policy on the steps of a source.

    samples: takes answers of the policy after a step, once for each step, and returns what an evaluation says of them.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        objective: Objective[MethodSettings],
        source: StepSource,
        cuts: Cuts,
        outputs: Outputs,
        world: World,
        should_stop: Callable[[], bool] = lambda: False,
        samples: Callable[[int], Mapping[str, float]] = lambda step: {},
    ) -> None:
        self.config, self.training = config, config.training
        self.policy, self.objective, self.source, self.world = policy, objective, source, world
        self.outputs, self.samples = outputs, samples
        check_columns(objective, policy=policy.SUPPLIES, source=source.supplies, also=source.also)
        self.strategy = policy.strategy
        self.parameters = self.strategy.trained
        self.optimizer = build_optimizer(self.parameters, self.training, config.lora.loraplus_lr_ratio)
        self.gradients = Gradients(config, policy, objective, source, cuts.training, world, outputs.note)
        self.scaler = self.strategy.scaler(enabled=policy.precision.scaler)
        self.snapshot = Snapshot(self.strategy, self.optimizer, self.scaler, source)
        self.saves = Saves(
            self.snapshot,
            outputs.save,
            outputs.note,
            world,
            keeps_best=config.finetuning.load_best_model_at_end,
            beside=self.training.async_save,
        )
        self.state = TrainState()
        self.window = MetricWindow()
        self.memory = DeviceMemory(world)
        self.digest = WeightsDigest(self.strategy)
        self.stalled = StalledLoss(source.num_steps, self._rate)
        self.evaluation: Evaluator | None = source.evaluator(outputs, self.should_stop)
        if source.validation is not None:
            parts = (config, policy, objective, source.validation, cuts.evaluation, outputs, world)
            self.evaluation = Validation(*parts, self.should_stop)
        self._stop_asked = should_stop
        self._mark = (0.0, 0)  # seconds and tokens at the last log line
        self._stood_still = self._looked_for_gradients = False

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Trains to the last step, or until early stopping. The weights are then those of the last step.

        Raises:
            TrainingError: a loss or gradient is not finite.
            Interrupted: a signal stopped the run; a checkpoint has been written.
        """
        state, options = self.state, self.config.finetuning
        if state.step == 0:
            self.samples(0)
        if self._evaluation_is_due():  # before the first step, or one that a signal had stopped
            self._between_steps(save=False)
        try:
            while state.step < self.source.num_steps and not stops_early(options, state):
                self.step(state.step + 1)
                if self._is_logged(state.step):
                    self._log()
                self._between_steps(save=state.step % self.training.save_steps == 0)
        finally:
            self.gradients.close()
            self.saves.close()
        if not self.window.is_empty:
            self._log()
        self.samples(state.step)
        return state

    def should_stop(self) -> bool:
        """Whether any process has been asked to stop."""
        return self.world.any(self._stop_asked())

    def _between_steps(self, *, save: bool) -> None:
        """Evaluates if due, saves, and stops if asked to. An evaluation that is due then waits for the resume."""
        improved = self._evaluation_is_due() and not self.should_stop() and self._evaluate()
        early = stops_early(self.config.finetuning, self.state)
        if early and not self.window.is_empty:
            self._log()  # before the checkpoint, so that a resume from it does not log the same steps again
        done = early or self.state.step == self.source.num_steps
        stop = self.should_stop()
        breaks_off = stop and (not done or self._evaluation_is_due())
        if stop or improved or save or done:
            self.state.window = self.window.state_dict()
            path = self.saves.save(self.state, must=breaks_off, last=done)
            if breaks_off:
                raise Interrupted(self.state.step, str(path))

    def _evaluation_is_due(self) -> bool:
        step = self.state.step
        if self.evaluation is None or self.state.evaluated_step == step:
            return False
        if step == 0:
            return self.training.eval_at_start
        return step % self.training.eval_steps == 0 or step == self.source.num_steps

    def _is_logged(self, step: int) -> bool:
        return step % self.training.logging_steps == 0 or step == self.source.num_steps

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.source.num_steps, self.training)

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """Does one optimizer step (from 1): gradients, update, record."""
        started = time.perf_counter()
        self.world.doing(f"step {step}")
        scale = self.scaler.scale(torch.ones((), device=self.world.device)) if self.scaler.is_enabled() else 1.0
        passes = self.gradients.take(step, scale)
        groups = passes.own.groups
        rate = self._rate(step)
        update = self._update(step, rate, passes.result, [groups.groups[i] for i in passes.order])
        numbers, margins = update.numbers, update.numbers.margins
        self.source.after(step)
        epoch, inside = self.source.place(step)
        seconds = time.perf_counter() - started
        self._emit(
            StepRecord(
                step=step,
                epoch=epoch,
                step_in_epoch=inside,
                epochs=self.source.epochs(step),
                indices=tuple(groups.indices or range(len(groups.groups))),
                cut=passes.own.cut,
                seed=(self.config.seed, step),
                learning_rate=rate,
                loss=numbers.loss,
                terms=numbers.terms,
                grad_norm=update.grad_norm,
                clipped=update.clipped,
                skipped=update.skipped,
                metrics={**numbers.metrics, **self.source.metrics(step)},
                margins=None if margins is None else _in_order(margins, passes.order).numpy(),
                num_groups=len(groups.groups),
                num_zero_signal_groups=sum(not self.objective.has_signal(group) for group in groups.groups),
                num_scored_tokens=passes.result.scores.structure.num_tokens,
                num_tokens=passes.num_tokens,
                seconds=seconds,
                weights=update.weights,
                update=update.moved,
                rows=tuple(map(row_hash, groups.groups)) if self.world.is_main else (),
                budget_tokens=self.gradients.budget_tokens,
            )
        )

    def _emit(self, record: StepRecord) -> None:
        """Hands the record of a step to everything that reads it."""
        self.state.add(record)
        self.state.micro_batch_tokens = self.gradients.fitting_tokens
        self.window.add(record)
        self.outputs.step(record)
        if note := self.stalled.after(record.step, record.loss):
            self.outputs.note(note)

    def _update(self, step: int, rate: float, result: StepScores, groups: Sequence[Group]) -> _Update:
        """Checks and clips the gradient, and updates the weights unless loss or gradient is not finite."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if not self._looked_for_gradients:
            self._looked_for_gradients = True
            if untouched := without_gradient(self.parameters):
                self.outputs.note(f"step {step}: {untouched}")
        limit = self.training.max_grad_norm or math.inf
        norm_there = self.strategy.clip(limit)
        numbers = result.fetch(norm=norm_there, weights=self.digest.sample())
        norm = numbers.more["norm"].item()
        finite = math.isfinite(numbers.loss) and math.isfinite(norm)
        moved: Mapping[str, FetchedMean] = {}
        if finite:
            set_rate(self.optimizer, rate)
            probe = UpdateProbe(self.strategy) if self._is_logged(step) else None
            if norm == 0.0 and not self._stood_still:
                self._stood_still = True
                self.outputs.note(
                    f"step {step}: every gradient is exactly 0, so this step changes nothing; either the loss cannot "
                    "fall any further on these rows (try a lower beta), or no trained weight takes part in it"
                )
            self.scaler.step(self.optimizer)
            moved = probe.measure() if probe else {}
        else:
            self._refuse_or_skip(step, result, numbers.loss, norm, groups)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        weights = self.digest.of(numbers.more["weights"])
        return _Update(numbers, weights, norm, clipped=norm > limit, skipped=not finite, moved=moved)

    def _refuse_or_skip(self, step: int, result: StepScores, loss: float, norm: float, groups: Sequence[Group]) -> None:
        overflow = self.scaler.is_enabled() and math.isfinite(loss)  # the scaler lowers its scale and goes on
        in_a_row = self.state.skipped_in_a_row + 1
        what = f"the loss is {loss} and the norm of the gradient {norm}"
        rows = suspect_rows(result, groups)
        allowed = overflow or self.training.on_nonfinite == "skip"
        if not allowed or in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{what}; the weights were not updated. Rows: {rows}",
                where=f"step {step}",
                expected="finite numbers",
                fix="look at these rows; lower training.learning_rate; use bf16 instead of fp16; "
                f"on_nonfinite: skip skips up to {MAX_SKIPPED_IN_A_ROW} such steps in a row",
            )
        self.outputs.note(f"step {step}: {what}; skipped ({in_a_row} in a row). Rows: {rows}")

    # -- log, evaluate, save -----------------------------------------------------------------------------------------

    def _log(self) -> None:
        state = self.state
        seconds, tokens = state.seconds - self._mark[0], state.tokens - self._mark[1]
        self._mark = (state.seconds, state.tokens)
        measured = self.window.flush()
        self.outputs.line(
            {
                "step": state.step,
                "epoch": self.source.epochs(state.step),
                "split": "train",
                "loss": measured.pop("loss", None),
                "learning_rate": self._rate(state.step),
                "grad_norm": measured.pop("grad_norm", None),
                "tokens": state.tokens,
                "tokens_per_second": tokens / seconds if seconds else None,
                "seconds": state.seconds,
                **self.memory.line(),
                **measured,
            }
        )

    def _evaluate(self) -> bool:
        """Evaluates. Returns whether this is the best model so far and must be saved; False if a signal stopped it."""
        assert self.evaluation is not None
        self.world.doing(f"evaluation after step {self.state.step}")
        numbers = self.evaluation.line(f"evaluation after step {self.state.step}")
        if numbers is None:
            return False
        if self.evaluation.row_losses is not None and self.world.is_main:
            self.outputs.row_losses(self.state.step, self.evaluation.row_losses)
        about = {"step": self.state.step, "epoch": self.source.epochs(self.state.step), "split": "eval"}
        line = {**about, **numbers, **self.samples(self.state.step)}
        self.outputs.line(line)
        self.state.evaluated_step = self.state.step
        value = deciding_value(self.config.finetuning, line, self.evaluation.names)
        if self.config.finetuning.load_best_model_at_end:
            self.saves.settle(self.state)  # so that the best step so far is one whose checkpoint is on the disk
        # The model before training is never the best one: a run that only got worse should not return its input.
        return is_best(self.config.finetuning, self.state, value) if self.state.step and value is not None else False

    def load_best(self, open_best: Callable[[int], Checkpoint]) -> int:
        """Loads the weights of the best evaluation, if that is asked for. Returns the step of the weights."""
        best, options = self.state.best_step, self.config.finetuning
        if not options.load_best_model_at_end or best is None or best == self.state.step:
            return self.state.step
        self.snapshot.load_tensors(open_best(best))
        return best

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: loads its weights, optimizer and state."""
        self.state = self.snapshot.restore(checkpoint)
        if self.state.micro_batch_tokens is not None:  # with dropout the cut decides the masks
            self.gradients.cut_finer(self.state.micro_batch_tokens)
        self.window.load_state_dict(self.state.window)
        self._mark = (self.state.seconds, self.state.tokens)
        self.saves.resumed(self.state)


def _in_order(values: Tensor, order: Sequence[int]) -> Tensor:
    """Sorts values by place: values[i] belongs to the group at place order[i]."""
    ordered = torch.empty_like(values)
    ordered[list(order)] = values
    return ordered
