"""Which evaluation is the best so far, and when to stop early. Floor 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from strop.config import FinetuningSection
from strop.engine.metrics import no_such_metric
from strop.engine.train_state import TrainState


def deciding_value(options: FinetuningSection, record: Mapping[str, Any], evaluated: Sequence[str]) -> float | None:
    """The metric that the best model and early stopping are decided by; None if neither is asked for.

    Args:
        record: an evaluation's line of metrics.jsonl.
        evaluated: the metrics that the method has.
    """
    if not options.load_best_model_at_end and options.early_stopping_patience is None:
        return None
    name = options.metric_for_best_model.removeprefix("eval_")
    if name not in record:
        raise no_such_metric(name, [k for k in evaluated if k in record])
    return float(record[name])


def is_best(options: FinetuningSection, state: TrainState, value: float) -> bool:
    """Takes the evaluation of `state.step` into account. Returns whether its model is the best so far and must be
    saved."""
    best = state.best_value
    better = best is None or (value > best if options.greater_is_better else value < best)
    better = better and math.isfinite(value)
    if better:
        state.best_value, state.best_step, state.stale_evals = value, state.step, 0
    else:
        state.stale_evals += 1
    return better and options.load_best_model_at_end


def stops_early(options: FinetuningSection, state: TrainState) -> bool:
    """Whether early stopping is on and its patience is used up."""
    patience = options.early_stopping_patience
    return patience is not None and state.stale_evals >= patience
