"""The trackers that `logging.report_to` names. Floor 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from strop.config import RunConfig
from strop.config.dump import to_values
from strop.rundir import RunDir
from strop.runfiles import TRACKERS
from strop.trackers.fan_out import Trackers
from strop.trackers.mlflow import MLflow
from strop.trackers.tensorboard import TensorBoard
from strop.trackers.tracker import SPLITS, RunFacts, Tracker
from strop.trackers.trackio import Trackio
from strop.trackers.wandb import WeightsAndBiases

KINDS: Mapping[str, Callable[[RunFacts], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def open_trackers(config: RunConfig, run: RunDir, *, name: str, resumed_at: int | None) -> Trackers:
    """The trackers of a run. What they need to go on after a resume stands in trackers.json.

    Call it before metrics.jsonl is cut back to the checkpoint: it says what an earlier process logged.

    Args:
        name: of the model, if `logging.run_name` is not given.
        resumed_at: the step of the checkpoint that the run goes on from.
    """
    logging = config.logging
    if not logging.report_to:
        return Trackers({})
    before = _read(run)
    identities, logged = before.get("identities", {}), _logged(run, before.get("logged", {}))
    facts = RunFacts(
        name=logging.run_name or name,
        logs=run.logs,
        config=to_values(config),
        resumed_at=resumed_at,
        logged=logged,
    )
    projects = {"wandb": logging.wandb_project, "mlflow": logging.mlflow_experiment, "trackio": logging.trackio_project}
    start: dict[str, Callable[[], Tracker]] = {
        kind: partial(KINDS[kind], replace(facts, project=projects.get(kind), known=identities.get(kind, {})))
        for kind in dict.fromkeys(logging.report_to)
    }

    def keep(found: Mapping[str, Mapping[str, str]]) -> None:
        run.write_json(
            TRACKERS, {"identities": {**identities, **{k: v for k, v in found.items() if v}}, "logged": logged}
        )

    return Trackers(start, keep)


def _read(run: RunDir) -> Mapping[str, Any]:
    try:
        found = json.loads((run.path / TRACKERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none yet; or it is damaged, and new runs begin in the trackers
        return {}
    return found if isinstance(found, dict) else {}


def _logged(run: RunDir, before: Mapping[str, int]) -> dict[str, int]:
    """By split, the last step that any earlier process logged, also one whose lines have been cut back since."""
    found = dict(before)
    for line in run.metrics.read():
        split, step = line.get("split"), line.get("step")
        if split in SPLITS and isinstance(step, int):
            found[str(split)] = max(step, found.get(str(split), -1))
    return found
