"""The training loop: step, log, evaluate, save, until the plan is done. Floor 3.

    for each step of the plan:
        forward and backward over its micro-batches  (step.py)
        refuse or clip the gradient, update          (optim.py)
        log, evaluate, save when due                 (metrics.py, evaluate.py, checkpoint.py)

Everything that a resume needs beside weights and optimizer fits in `TrainState`: the order of the data and the state
of dropout are functions of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from strop.batch import Batch
from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.data.plan import Plan
from strop.engine.best import deciding_value, is_best, stops_early
from strop.engine.checkpoint import Checkpoint
from strop.engine.evaluate import evaluate
from strop.engine.memory import does_not_fit
from strop.engine.metrics import MetricWindow, UpdateProbe, means, peak_memory_gib
from strop.engine.optim import (
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    set_optimizer_numbers,
    without_gradient,
)
from strop.engine.recipe import cut_matters
from strop.engine.rows import Rows
from strop.engine.stalled import StalledLoss
from strop.engine.state import TrainState
from strop.engine.step import StepScores, forward_backward, suspect_rows
from strop.errors import Interrupted, SaveError, TrainingError
from strop.objectives.base import Objective
from strop.policy.memory import attempt
from strop.policy.policy import Policy
from strop.policy.reference import SyncedReference
from strop.types import Group

MAX_SKIPPED_IN_A_ROW = 10
"""Non-finite steps that may be left out one after the other before a run stops."""


class _EvaluationStoppedError(Exception):
    """A signal came in the middle of an evaluation."""


class Outputs(Protocol):
    """Where the loop puts what it finds; the wiring decides what stands behind it."""

    def record(self, record: Mapping[str, Any]) -> None: ...
    def margins(self, epoch: int, step_in_epoch: int, step: int, margins: Tensor) -> None: ...
    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], protect: Sequence[int]
    ) -> Path: ...
    def stepped(self, shown: Mapping[str, float]) -> None: ...
    def evaluating(self, num_groups: int) -> AbstractContextManager[Callable[[int], None]]: ...
    def note(self, text: str) -> None: ...


class Loop:
    """One run over one plan."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        objective: Objective[MethodSettings],
        plan: Plan,
        train: Rows,
        validation: Rows | None,
        outputs: Outputs,
        should_stop: Callable[[], bool] = lambda: False,
        reference: SyncedReference | None = None,
    ) -> None:
        self.config, self.training = config, config.training
        self.policy, self.objective, self.plan = policy, objective, plan
        self.train, self.validation = train, validation
        self.outputs, self.should_stop, self.reference = outputs, should_stop, reference
        self.parameters = policy.trainable()
        self.optimizer = build_optimizer(self.parameters, self.training)
        self.device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=policy.precision.scaler)
        self.state = TrainState()
        self.window = MetricWindow()
        self.stalled = StalledLoss(plan.num_steps, lambda step: learning_rate(step, plan.num_steps, self.training))
        self._mark = (0.0, 0)  # seconds and tokens at the last log line
        self._kept_best: tuple[int | None, float | None] = (None, None)  # of the last save: step and value
        self._stood_still = self._looked_for_gradients = False

    # -- the road ----------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the plan, or to early stopping; the weights are then those of the last step.

        Raises:
            TrainingError: a step that is not finite.
            Interrupted: stopped by a signal, after a checkpoint.
        """
        state, plan, options = self.state, self.plan, self.config.finetuning
        if self._evaluation_is_due():  # before the first step, or what a signal broke off
            self._between_steps(save=False)
        while state.step < plan.num_steps and not stops_early(options, state):
            self.step(state.step + 1)
            last = state.step == plan.num_steps
            if state.step % self.training.logging_steps == 0 or last:
                self._log()
            self._between_steps(save=state.step % self.training.save_steps == 0)
        if not self.window.is_empty:
            self._log()
        return state

    def _between_steps(self, *, save: bool) -> None:
        """Evaluate where it is due, save, and stop where that is asked for: then an evaluation waits for the resume."""
        improved = self._evaluation_is_due() and not self.should_stop() and self._evaluate()
        early = stops_early(self.config.finetuning, self.state)
        if early and not self.window.is_empty:
            self._log()  # before the checkpoint, so that a resume from it does not log the same steps again
        done = early or self.state.step == self.plan.num_steps
        stop = self.should_stop()
        breaks_off = stop and (not done or self._evaluation_is_due())
        if stop or improved or save or done:
            path = self._save(must=breaks_off)
            if breaks_off:
                raise Interrupted(self.state.step, str(path))
            if path is None and not done:
                self._forget_unsaved_best()

    def _evaluation_is_due(self) -> bool:
        step = self.state.step
        if self.validation is None or self.state.evaluated_step == step:
            return False
        if step == 0:
            return self.training.eval_at_start
        return step % self.training.eval_steps == 0 or step == self.plan.num_steps

    def load_best(self, open_best: Callable[[int], Checkpoint]) -> int:
        """Take the weights of the best evaluation, where that is asked for; the step they are of."""
        best, options = self.state.best_step, self.config.finetuning
        if not options.load_best_model_at_end or best is None or best == self.state.step:
            return self.state.step
        tensors, _ = self._tensors()
        open_best(best).load_into(tensors)
        return best

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: its weights, optimizer and state."""
        saved = checkpoint.state
        tensors, _ = self._tensors()
        checkpoint.load_into(tensors)
        set_optimizer_numbers(self.optimizer, self.parameters, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.state = TrainState(**saved["train"])
        if self.state.micro_batch_tokens is not None:  # with dropout the cut decides the masks
            self.train = self.train.cut_to(self.state.micro_batch_tokens)
        self.window.load_state_dict(self.state.window)
        self._mark = (self.state.seconds, self.state.tokens)
        self._kept_best = (self.state.best_step, self.state.best_value)

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """One optimizer step, from 1: gradients, update, margins, the bar."""
        started = time.perf_counter()
        indices = self.plan.groups(step)
        result, order, num_tokens = self._gradients(step, indices)
        rate = learning_rate(step, self.plan.num_steps, self.training)
        groups = [self.train.groups[i] for i in order]
        self._update(step, rate, result, groups)
        if self.reference is not None:
            self.reference.after(step)
        epoch, inside = self.plan.position(step)
        self.state.step = step
        self.state.tokens += num_tokens
        self.state.seconds += time.perf_counter() - started
        self.window.add_totals(
            num_groups=len(groups),
            num_zero_signal_groups=sum(_has_no_signal(g) for g in groups),
            num_scored_tokens=result.scores.count("tokens"),
        )
        if result.margins is not None and self.config.logging.margins:
            place = {i: at for at, i in enumerate(order)}
            in_plan = result.margins[[place[i] for i in indices]]  # however the step was cut
            self.outputs.margins(epoch, inside, step, in_plan)
        shown = {"loss": result.loss, "epoch": step / self.plan.steps_per_epoch, "tokens": self.state.tokens}
        if "rewards/margins" in result.metrics:
            total, count = result.metrics["rewards/margins"]
            shown["rewards/margins"] = float(total) / count
        self.outputs.stepped(shown)
        if note := self.stalled.after(step, result.loss):
            self.outputs.note(note)

    def _gradients(self, step: int, indices: Sequence[int]) -> tuple[StepScores, list[int], int]:
        """The gradients of one step, its scores, the order of its groups in them, and the tokens fed to the model.

        Where memory runs out, what the step has added to the gradients is dropped and the whole step is taken again in
        smaller micro-batches: the same step, since the cut changes nothing (but dropout's masks).
        """
        scale = float(self.scaler.scale(torch.ones((), device=self.device))) if self.scaler.is_enabled() else 1.0

        def whole_step() -> tuple[StepScores, list[int], int]:
            parts = self.train.parts(indices)
            batches = [self.train.batch(self.policy, part) for part in parts]
            apart = list(self.train.apart(self.policy, self.plan.visits(step)))
            seed = (self.config.seed, step)
            with self.policy.still():
                result = forward_backward(self.policy, self.objective, batches, apart, seed=seed, scale=scale)
            return result, [i for part in parts for i in part], sum(b.num_tokens for b in (*batches, *apart))

        while True:
            done, why = attempt(whole_step)
            if done is not None:
                return done
            self.optimizer.zero_grad(set_to_none=True)
            smaller = self.train.smaller(indices, self.plan.visits(step))
            if smaller is None:
                longest = max((self.train.groups[i] for i in indices), key=lambda group: group.num_tokens)
                raise does_not_fit(self.config, why, f"step {step}", longest, backward=True)
            but = ", but for the masks of lora_dropout" if cut_matters(self.config) else ""
            self.outputs.note(_cut_finer(f"step {step}", why, self.train, smaller) + but)
            self.train, self.state.micro_batch_tokens = smaller, smaller.budget_tokens

    def _update(self, step: int, rate: float, result: StepScores, groups: Sequence[Group]) -> None:
        """Check, clip, step. The weights stay as they are where anything is not finite."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if not self._looked_for_gradients:
            self._looked_for_gradients = True
            if untouched := without_gradient(self.parameters):
                self.outputs.note(f"step {step}: {untouched}")
        limit = self.training.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(result.loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            logged = step % self.training.logging_steps == 0 or step == self.plan.num_steps
            probe = UpdateProbe(self.parameters) if logged else None
            if norm == 0.0 and not self._stood_still:
                self._stood_still = True
                self.outputs.note(
                    f"step {step}: every gradient is exactly 0, so this step changes nothing; either the loss cannot "
                    "fall any further on these rows (a lower beta?), or no weight that trains has a part in it"
                )
            self.scaler.step(self.optimizer)
            self.state.skipped_in_a_row = 0
            self.window.add_means(
                {f"loss/{t}": (share, 1) for t, share in result.terms.items() if len(result.terms) > 1}
            )
            self.window.add_means(
                {"loss": (result.loss, 1), "grad_norm": (norm, 1), "clipped": (float(norm > limit), 1)}
            )
            self.window.add_means(result.metrics)
            if probe:
                self.window.add_means(probe.measure())
        else:
            self._refuse_or_skip(step, result, norm, groups)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _refuse_or_skip(self, step: int, result: StepScores, norm: float, groups: Sequence[Group]) -> None:
        overflow = self.scaler.is_enabled() and math.isfinite(result.loss)  # the scaler lowers its scale and goes on
        self.state.skipped_in_a_row += 1
        self.state.num_skipped += 1
        what = f"the loss is {result.loss} and the norm of the gradient {norm}"
        rows = suspect_rows(result, groups)
        allowed = overflow or self.training.on_nonfinite == "skip"
        if not allowed or self.state.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{what}; the update was not made. Rows: {rows}",
                where=f"step {step}",
                expected="finite numbers",
                fix="look at these rows; lower training.learning_rate; use bf16 instead of fp16; "
                f"on_nonfinite: skip leaves out up to {MAX_SKIPPED_IN_A_ROW} such steps in a row",
            )
        self.window.add_totals(num_skipped_steps=1)
        self.outputs.note(f"step {step}: {what}; skipped ({self.state.skipped_in_a_row} in a row). Rows: {rows}")

    # -- log, evaluate, save -----------------------------------------------------------------------------------------

    def _log(self) -> None:
        state = self.state
        seconds, tokens = state.seconds - self._mark[0], state.tokens - self._mark[1]
        self._mark = (state.seconds, state.tokens)
        measured = self.window.flush()
        self.outputs.record(
            {
                "step": state.step,
                "epoch": state.step / self.plan.steps_per_epoch,
                "split": "train",
                "loss": measured.pop("loss", None),
                "learning_rate": learning_rate(state.step, self.plan.num_steps, self.training),
                "grad_norm": measured.pop("grad_norm", None),
                "tokens": state.tokens,
                "tokens_per_second": tokens / seconds if seconds else None,
                "seconds": state.seconds,
                "peak_memory_gib": peak_memory_gib(self.device),
                **measured,
            }
        )

    def _evaluate(self) -> bool:
        """Evaluate; true when this is the best model so far and to be kept. A signal ends it without a result."""
        assert self.validation is not None
        started = time.perf_counter()
        try:
            result = self._validation_scores(self.validation)
        except _EvaluationStoppedError:
            return False
        metrics = means(
            {n: float(total) for n, (total, _) in result.metrics.items()},
            {n: count for n, (_, count) in result.metrics.items()},
        )
        record = {
            "step": self.state.step,
            "epoch": self.state.step / self.plan.steps_per_epoch,
            "split": "eval",
            "loss": result.loss,
            **({f"loss/{t}": share for t, share in result.terms.items()} if len(result.terms) > 1 else {}),
            "num_groups": result.scores.num_groups,
            "num_scored_tokens": result.scores.count("tokens"),
            "seconds": time.perf_counter() - started,
            **metrics,
        }
        self.outputs.record(record)
        self.state.evaluated_step = self.state.step
        value = deciding_value(self.config.finetuning, record, self.objective.evaluated)
        # the model before training is no candidate: a run that never gets better than it should not return it unseen
        return is_best(self.config.finetuning, self.state, value) if self.state.step and value is not None else False

    def _validation_scores(self, rows: Rows) -> StepScores:
        def scores() -> StepScores:
            with self.policy.scoring(), self.outputs.evaluating(len(rows.groups)) as done:
                batches = (rows.batch(self.policy, part) for part in rows.parts())
                apart = self._until_stopped(rows.apart(self.policy))
                return evaluate(self.policy, self.objective, self._until_stopped(batches), apart, done)

        found, why = attempt(scores)
        if found is not None:
            return found
        where, smaller = f"evaluation after step {self.state.step}", rows.smaller()
        if smaller is None:
            raise does_not_fit(self.config, why, where, max(rows.groups, key=lambda group: group.num_tokens))
        self.outputs.note(_cut_finer(where, why, rows, smaller))
        self.validation = smaller
        return self._validation_scores(smaller)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """An evaluation can be long, and nothing of it is lost but itself."""
        for batch in batches:
            if self.should_stop():
                raise _EvaluationStoppedError
            yield batch

    def _save(self, *, must: bool) -> Path | None:
        """Save this step; None where the disk does not take it and it need not: the run goes on, and the next save may
        work. After the last step there is still the final model."""
        self.state.window = self.window.state_dict()
        tensors, numbers = self._tensors()
        state = {"train": asdict(self.state), "optimizer": numbers, "scaler": self.scaler.state_dict()}
        best = [self.state.best_step] if self.state.best_step and self.config.finetuning.load_best_model_at_end else []
        try:
            path = self.outputs.save(self.state.step, tensors, state, best)
        except SaveError as error:
            if must:
                raise
            self.outputs.note(f"warning: step {self.state.step} is not saved, the next save is tried again: {error}")
            return None
        self._kept_best = (self.state.best_step, self.state.best_value)
        return path

    def _forget_unsaved_best(self) -> None:
        """Weights that are not saved cannot be returned in the end."""
        if self.config.finetuning.load_best_model_at_end and self.state.best_step == self.state.step:
            self.state.best_step, self.state.best_value = self._kept_best

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = optimizer_tensors(self.optimizer, self.parameters)
        weights = {f"policy.{n}": p.detach() for n, p in self.parameters.items()}
        if self.reference is not None:
            weights |= {f"reference.{n}": p for n, p in self.reference.weights.items()}
        return {**weights, **tensors}, numbers


def _cut_finer(where: str, why: str, rows: Rows, smaller: Rows) -> str:
    return (
        f"{where}: memory ran out ({why}); again, and from here on, in micro-batches of at most "
        f"{smaller.budget_tokens:,} tokens instead of {rows.budget_tokens:,}. The result is the same"
    )


def _has_no_signal(group: Group) -> bool:
    """Whether no preference can be learnt from a group: its completions are the same tokens."""
    first, *rest = group.completions
    return bool(rest) and all(c == first for c in rest)
