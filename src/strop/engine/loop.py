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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from strop.batch import NOTHING, Batch, Extras
from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.data.plan import Plan, RowTokens, cut, longest_first
from strop.engine.checkpoint import Checkpoint
from strop.engine.evaluate import evaluate
from strop.engine.metrics import MetricWindow, UpdateProbe, means, peak_memory_gib
from strop.engine.optim import build_optimizer, learning_rate, optimizer_tensors, set_optimizer_numbers
from strop.engine.step import StepScores, forward_backward
from strop.errors import ConfigError, Interrupted, TrainingError
from strop.objectives.base import Objective
from strop.policy.policy import Policy
from strop.policy.reference import SyncedReference
from strop.types import Group

MAX_SKIPPED_IN_A_ROW = 10
"""Non-finite steps that may be left out one after the other before a run stops."""


@dataclass(frozen=True)
class Rows:
    """Groups, how they are cut into micro-batches, and what is laid beside them.

    ref_logps: indices of groups -> the reference's log-probs of each, [scored tokens], where the objective needs them.
    mismatched: the prompts with completions of others, by visit, where the objective needs them. extras: what else the
    policy is to score.
    """

    groups: Sequence[Group]
    budget_tokens: int
    tokens: RowTokens
    ref_logps: Callable[[Sequence[int]], list[Tensor]] | None = None
    mismatched: Rows | None = None
    extras: Extras = NOTHING

    def parts(self, indices: Iterable[int]) -> list[list[int]]:
        """Indices of groups, cut into micro-batches."""
        return cut(self.groups, indices, self.budget_tokens, self.tokens)

    def in_any_order(self, indices: Iterable[int] | None = None) -> list[list[int]]:
        """The same for a pass in which order means nothing: evaluation, reference. Default: all groups."""
        return self.parts(longest_first(self.groups, range(len(self.groups)) if indices is None else indices))

    def apart(self, policy: Policy, visits: Iterable[int] | None = None) -> Iterator[Batch]:
        """The micro-batches of the mismatched completions of these visits (default: all), where there are any."""
        rows = self.mismatched
        return iter(()) if rows is None else (rows.batch(policy, part) for part in rows.in_any_order(visits))

    def batch(self, policy: Policy, part: Sequence[int]) -> Batch:
        refs = None if self.ref_logps is None else self.ref_logps(part)
        return policy.collate([self.groups[i] for i in part], refs, self.extras)


@dataclass
class TrainState:
    """What a run knows at the end of a step, besides weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    stale_evals: int = 0
    skipped_in_a_row: int = 0
    num_skipped: int = 0
    window: dict[str, Any] = field(default_factory=lambda: MetricWindow().state_dict())


class Outputs(Protocol):
    """Where the loop puts what it finds; the wiring decides what stands behind it."""

    def record(self, record: Mapping[str, Any]) -> None: ...
    def margins(self, epoch: int, step_in_epoch: int, step: int, margins: Tensor) -> None: ...
    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], protect: Sequence[int]
    ) -> Path: ...
    def stepped(self, shown: Mapping[str, float]) -> None: ...
    def evaluating(self, num_groups: int) -> Callable[[int], None]: ...
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
        self._mark = (0.0, 0)  # seconds and tokens at the last log line

    # -- the road ----------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the plan, or to early stopping; the weights are then those of the last step.

        Raises:
            TrainingError: a step that is not finite.
            Interrupted: stopped by a signal, after a checkpoint.
        """
        state, plan = self.state, self.plan
        if state.step == 0:
            self._evaluate()
        while state.step < plan.num_steps and not self._stopped_early():
            self._step(state.step + 1)
            last = state.step == plan.num_steps
            if state.step % self.training.logging_steps == 0 or last:
                self._log()
            improved = (state.step % self.training.eval_steps == 0 or last) and self._evaluate()
            if self._stopped_early() and not self.window.is_empty:
                self._log()  # before the checkpoint, so that a resume from it does not log the same steps again
            stop = self.should_stop()
            if stop or improved or (state.step % self.training.save_steps == 0 and not last):
                path = self._save()
                if stop and not last:
                    raise Interrupted(state.step, str(path))
        if not self.window.is_empty:
            self._log()
        return state

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
        self.window.load_state_dict(self.state.window)
        self._mark = (self.state.seconds, self.state.tokens)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        indices = self.plan.groups(step)
        batches = [self.train.batch(self.policy, part) for part in self.train.parts(indices)]
        scale = float(self.scaler.scale(torch.ones(()))) if self.scaler.is_enabled() else 1.0
        apart = list(self.train.apart(self.policy, self.plan.visits(step)))
        seed = (self.config.seed, step)
        with self.policy.still():
            result = forward_backward(self.policy, self.objective, batches, apart, seed=seed, scale=scale)
        rate = learning_rate(step, self.plan.num_steps, self.training)
        groups = [self.train.groups[i] for i in indices]
        self._update(step, rate, result, groups)
        if self.reference is not None:
            self.reference.after(step)
        epoch, inside = self.plan.position(step)
        self.state.step = step
        self.state.tokens += sum(b.num_tokens for b in (*batches, *apart))
        self.state.seconds += time.perf_counter() - started
        self.window.add_totals(
            num_groups=len(groups),
            num_zero_signal_groups=sum(_has_no_signal(g) for g in groups),
            num_scored_tokens=result.scores.count("tokens"),
        )
        if result.margins is not None and self.config.logging.margins:
            self.outputs.margins(epoch, inside, step, result.margins)
        shown = {"loss": result.loss, "epoch": step / self.plan.steps_per_epoch, "tokens": self.state.tokens}
        if "rewards/margins" in result.metrics:
            total, count = result.metrics["rewards/margins"]
            shown["rewards/margins"] = float(total) / count
        self.outputs.stepped(shown)

    def _update(self, step: int, rate: float, result: StepScores, groups: Sequence[Group]) -> None:
        """Check, clip, step. The weights stay as they are where anything is not finite."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        limit = self.training.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if math.isfinite(result.loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            logged = step % self.training.logging_steps == 0 or step == self.plan.num_steps
            probe = UpdateProbe(self.parameters) if logged else None
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
        rows = _suspect_rows(result, groups)
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
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # it sees the infinities and leaves the weights alone

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
        """Evaluate, where there are validation rows; true when this is the best model so far and to be kept."""
        if self.validation is None:
            return False
        started = time.perf_counter()
        rows = self.validation
        with self.policy.scoring():
            batches = (rows.batch(self.policy, part) for part in rows.in_any_order())
            done = self.outputs.evaluating(len(rows.groups))
            result = evaluate(self.policy, self.objective, batches, rows.apart(self.policy), done)
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
        value = self._deciding(record)
        # the model before training is no candidate: a run that never gets better than it should not return it unseen
        return self._is_best(value) if self.state.step and value is not None else False

    def _deciding(self, record: Mapping[str, Any]) -> float | None:
        """What the best model is chosen by and early stopping goes by; None where there is neither."""
        options = self.config.finetuning
        if not options.load_best_model_at_end and options.early_stopping_patience is None:
            return None
        name = options.metric_for_best_model.removeprefix("eval_")
        if name not in record:
            raise ConfigError(
                f"no evaluation has a metric {name!r}",
                where=f"finetuning.metric_for_best_model: {options.metric_for_best_model}",
                expected="one of " + ", ".join(sorted(k for k, v in record.items() if isinstance(v, float))),
                fix="name one of these",
            )
        return float(record[name])

    def _is_best(self, value: float) -> bool:
        options, best = self.config.finetuning, self.state.best_value
        better = best is None or (value > best if options.greater_is_better else value < best)
        better = better and math.isfinite(value)
        if better:
            self.state.best_value, self.state.best_step, self.state.stale_evals = value, self.state.step, 0
        else:
            self.state.stale_evals += 1
        return better and options.load_best_model_at_end

    def _stopped_early(self) -> bool:
        patience = self.config.finetuning.early_stopping_patience
        return patience is not None and self.state.stale_evals >= patience

    def _save(self) -> Path:
        self.state.window = self.window.state_dict()
        tensors, numbers = self._tensors()
        state = {"train": asdict(self.state), "optimizer": numbers, "scaler": self.scaler.state_dict()}
        best = [self.state.best_step] if self.state.best_step and self.config.finetuning.load_best_model_at_end else []
        return self.outputs.save(self.state.step, tensors, state, best)

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = optimizer_tensors(self.optimizer, self.parameters)
        weights = {f"policy.{n}": p.detach() for n, p in self.parameters.items()}
        if self.reference is not None:
            weights |= {f"reference.{n}": p for n, p in self.reference.weights.items()}
        return {**weights, **tensors}, numbers


def _has_no_signal(group: Group) -> bool:
    """Whether no preference can be learnt from a group: its completions are the same tokens."""
    first, *rest = group.completions
    return bool(rest) and all(c == first for c in rest)


def _suspect_rows(result: StepScores, groups: Sequence[Group], most: int = 8) -> str:
    """The rows with log-probs that are not finite; where all are finite, all rows of the step."""
    sums = result.scores.sums(result.scores.logps)
    bad = sorted(set(result.scores.group_index[~torch.isfinite(sums)].tolist()))
    rows = [str(groups[i].origin) for i in bad or range(len(groups))]
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
