"""How a run ended: why, what the evaluations before and after say, and whether it got worse. Floor 3.

In: the records of metrics.jsonl. Out: an `Ending`, which is the run folder's result.json, and lines for a person.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strop.config import RunConfig
from strop.engine.best import stops_early
from strop.engine.state import TrainState
from strop.errors import CheckpointError
from strop.runfiles import RESULT

SHOWN = ("loss", "rewards/accuracies", "rewards/margins")
"""Metrics of the lines, where an evaluation has them."""
VISIBLE = 1e-4
"""A loss is worse, or has moved at all, where it differs by more than this share of what it was."""


@dataclass(frozen=True)
class Ending:
    """reason: why the run ended, as a sentence. early: by early stopping. step: the last one trained, of num_steps.
    final_step: the step that the model in `final/` is of. metrics: by name (`eval_at_start`: before the first step;
    `eval`: of `final_step`; `train`: the last line of the training), records of metrics.jsonl. worse: whether the loss
    of `eval` is above that of `eval_at_start`; null where one of them is missing.
    """

    reason: str
    early: bool
    step: int
    num_steps: int
    final_step: int
    metrics: Mapping[str, Mapping[str, Any]]
    worse: bool | None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        state: TrainState,
        *,
        num_steps: int,
        final_step: int,
        records: Iterable[Mapping[str, Any]],
    ) -> Ending:
        """records: all of metrics.jsonl, in its order."""
        metrics: dict[str, Mapping[str, Any]] = {}
        for record in records:
            if record.get("split") == "train":
                metrics["train"] = record
            elif record.get("step") == 0:
                metrics["eval_at_start"] = record
            elif record.get("step") == final_step:
                metrics["eval"] = record
        early = stops_early(config.finetuning, state) and state.step < num_steps
        done = f"all {num_steps} steps are done" if num_steps > 1 else "the one step is done"
        reason = _stopped_early(config, state, num_steps) if early else done
        return cls(reason, early, state.step, num_steps, final_step, metrics, _is_worse(metrics))

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a person; what is bad is in `warning`."""
        yield self.reason
        before, after = self.metrics.get("eval_at_start"), self.metrics.get("eval")
        if after is None:
            return
        if before is None:
            shown = ", ".join(f"{name} {number(after[name])}" for name in SHOWN if _has(after, name))
            yield f"evaluation of the model of step {self.final_step}: {shown}"
            return
        # the rewards before the first step are those of the reference itself: 0, whatever the model
        shown = f"loss {number(before.get('loss'))} -> {number(after.get('loss'))}"
        shown += "".join(f", {name} {number(after[name])}" for name in SHOWN[1:] if _has(after, name))
        yield f"evaluation before the first step and of the model of step {self.final_step}: {shown}"

    def warning(self) -> str | None:
        """What speaks against the model in `final/`."""
        if not self.worse:
            return None
        before, after = self.metrics["eval_at_start"]["loss"], self.metrics["eval"]["loss"]
        return (
            f"the model got worse: its evaluation loss was {number(before)} before the first step and is "
            f"{number(after)} now. Lower training.learning_rate, train fewer steps, or look at the data; the model "
            "that the run began with is as it was"
        )


@dataclass(frozen=True)
class RunResult:
    """One model's finished run: `final` holds the model, `run_dir` everything else. ending: why it ended, and what
    its evaluations say; the same as result.json in the run folder."""

    name: str
    run_dir: Path
    ending: Ending

    @property
    def step(self) -> int:
        """The last step trained, which is not the step of `final` where the best model was asked for."""
        return self.ending.step

    @property
    def reason(self) -> str:
        """Why the run ended, as a sentence."""
        return self.ending.reason

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """Records of metrics.jsonl: `train`, the last line of the training; `eval`, the evaluation of the model in
        `final`; `eval_at_start`, the one before the first step. The last two where there are validation rows."""
        return self.ending.metrics

    @property
    def got_worse(self) -> bool | None:
        """Whether the evaluation loss is above that before the first step; None where there is none to compare."""
        return self.ending.worse

    @property
    def final(self) -> Path:
        return self.run_dir / "final"


def ending_of(run_dir: Path) -> Ending:
    """How the run that is finished ended, as it wrote it down.

    Raises:
        CheckpointError: it cannot be read.
    """
    written = run_dir / RESULT
    try:
        return Ending(**json.loads(written.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the run is finished, and how it ended cannot be read: {error}",
            where=str(written),
            fix="its model is in final/; train anew with --overwrite or in another training.output_dir",
        ) from error


def _stopped_early(config: RunConfig, state: TrainState, num_steps: int) -> str:
    options = config.finetuning
    best = "none was finite" if state.best_value is None else f"{number(state.best_value)} at step {state.best_step}"
    return (
        f"stopped early after step {state.step} of {num_steps}: {state.stale_evals} evaluations in a row "
        f"(finetuning.early_stopping_patience) were not better; the best {options.metric_for_best_model} is {best}"
    )


def _is_worse(metrics: Mapping[str, Mapping[str, Any]]) -> bool | None:
    before, after = metrics.get("eval_at_start"), metrics.get("eval")
    if before is None or after is None or not _has(before, "loss"):
        return None
    if not _has(after, "loss"):
        return True  # null: it is not finite any more
    return bool(after["loss"] > before["loss"] + VISIBLE * abs(before["loss"]))


def _has(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float)


def number(value: float | None) -> str:
    """A metric for a person."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.3g}"
