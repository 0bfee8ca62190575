"""How a run ended: why it stopped, the evaluations before and after, and whether the model got worse. Floor 3.

In: the lines of metrics.jsonl. Out: an `Ending`, which is written as result.json, and lines of text about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strop.config import RunConfig
from strop.engine.best_evaluation import stops_early
from strop.engine.train_state import TrainState
from strop.errors import CheckpointError
from strop.runfiles import RESULT
from strop.significance import Change

SHOWN = ("loss", "reward", "rewards/accuracies", "rewards/margins")
"""Metrics that the lines show, if an evaluation has them."""
VISIBLE = 1e-4
"""A loss counts as worse if it is above the earlier one by more than this share of it."""


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    reason: why, as a sentence. early: whether by early stopping. step: the last step trained, of num_steps. final_step:
    the step of the model in `final/`. metrics: lines of metrics.jsonl by name: `eval_at_start` before the first step,
    `eval` of `final_step`, `train` the last one of the training. worse: whether the loss of `eval` is above that of
    `eval_at_start` by more than chance, or, where completions are sampled, its mean reward below it by more than
    chance; None if one of them is missing.
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
        change: Change | None = None,
    ) -> Ending:
        """records: all lines of metrics.jsonl, in order. change: of the evaluation loss since before the first step, by
        paired rows, if that is known."""
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
        return cls(reason, early, state.step, num_steps, final_step, metrics, _is_worse(metrics, change))

    def as_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Lines of text about the ending. A model that got worse is left to `warning`."""
        yield self.reason
        before, after = self.metrics.get("eval_at_start"), self.metrics.get("eval")
        if after is None:
            return
        if before is None:
            shown = ", ".join(f"{name} {number(after[name])}" for name in SHOWN if _has(after, name))
            yield f"evaluation of the model of step {self.final_step}: {shown}"
            return
        # rewards before the first step are not shown: the policy is still the reference, so they are 0
        first = _decides(before)
        shown = f"{first} {number(before.get(first))} -> {number(after.get(first))}"
        shown += "".join(f", {name} {number(after[name])}" for name in SHOWN if name != first and _has(after, name))
        yield f"evaluation before the first step and of the model of step {self.final_step}: {shown}"

    def warning(self) -> str | None:
        """Why not to use the model in `final/`; None if nothing speaks against it."""
        if not self.worse:
            return None
        name = _decides(self.metrics["eval_at_start"])
        before, after = self.metrics["eval_at_start"].get(name), self.metrics["eval"].get(name)
        return (
            f"the model got worse: its evaluation {name} was {number(before)} before the first step and is "
            f"{number(after)} now. Lower training.learning_rate, train fewer steps, or look at the data. The model "
            "that the run started from is unchanged"
        )


@dataclass(frozen=True)
class RunResult:
    """The finished run of one model: `final` holds the model, `run_dir` everything else. ending: the content of
    result.json, which says why the run ended and what its evaluations were."""

    name: str
    run_dir: Path
    ending: Ending

    @property
    def step(self) -> int:
        """The last step trained. The model in `final` may be of an earlier one, if that was the best."""
        return self.ending.step

    @property
    def reason(self) -> str:
        """Why the run ended, as a sentence."""
        return self.ending.reason

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """Lines of metrics.jsonl: `train`, the last one of the training; `eval`, the evaluation of the model in
        `final`; `eval_at_start`, the one before the first step. The last two need validation rows."""
        return self.ending.metrics

    @property
    def got_worse(self) -> bool | None:
        """Whether the evaluation is worse than that before the first step (`Ending.worse`); None if one is missing."""
        return self.ending.worse

    @property
    def final(self) -> Path:
        return self.run_dir / "final"


def ending_of(run_dir: Path) -> Ending:
    """Reads how a finished run ended.

    Raises:
        CheckpointError: result.json cannot be read.
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


def _is_worse(metrics: Mapping[str, Mapping[str, Any]], change: Change | None) -> bool | None:
    before, after = metrics.get("eval_at_start"), metrics.get("eval")
    if before is None or after is None:
        return None
    if _decides(before) == "reward":
        return bool(after.get("reward_high", after["reward"]) < before["reward"]) if _has(after, "reward") else None
    if not _has(before, "loss"):
        return None
    if not _has(after, "loss"):
        return True  # null: it is not finite any more
    is_above = bool(after["loss"] > before["loss"] + VISIBLE * abs(before["loss"]))
    return is_above and (change is None or change.of(before["loss"], after["loss"]).is_rise)


def _decides(record: Mapping[str, Any]) -> str:
    """What evaluations of this run are compared by: one that samples has no loss."""
    return "reward" if "loss" not in record and _has(record, "reward") else "loss"


def _has(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), int | float)


def number(value: float | None) -> str:
    """A metric as text, with about four digits."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.3g}"
