"""MLflow: its database file or its server, whichever MLFLOW_TRACKING_URI names. Floor 2."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from strop.durable import to_json
from strop.redact import redact
from strop.trackers.tracker import REPORT, SPLITS, Ended, Held, RunFacts, Table, charted

logger = logging.getLogger(__name__)

DEFAULTS = {
    # MLflow waits for minutes by itself; what a server does not take is offered again later
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""Variables of MLflow where the environment does not set them."""
STATUS: Mapping[Ended, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """A run of MLflow: parameters, metrics under `{split}/{name}`, and system metrics from a thread of MLflow's own."""

    knows = True

    def __init__(self, facts: RunFacts) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client, self._metric = MlflowClient(), Metric
        known = facts.known.get("run_id")
        self._run_id = known or self._create(facts)
        self.identity: Mapping[str, str] = {"run_id": self._run_id}
        self._say_where()
        if known:
            self._client.update_run(known, status="RUNNING")
        else:
            params = [Param(name, str(value)) for name, value in _flat(facts.config)]
            for at in range(0, len(params), 100):  # MLflow takes 100 at once
                self._client.log_batch(self._run_id, params=params[at : at + 100])
        self._held = self._look() if known else Held({})
        self._unsure = False
        self._monitor = SystemMetricsMonitor(self._run_id, resume_logging=True)
        self._monitor.start()

    def _create(self, facts: RunFacts) -> str:
        name = facts.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "strop"
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        return str(self._client.create_run(number, run_name=facts.name).info.run_id)

    def _say_where(self) -> None:
        """Without MLFLOW_TRACKING_URI, MLflow puts its database and its artifacts into the folder where strop runs."""
        from mlflow import get_tracking_uri

        uri, run = redact(get_tracking_uri()), self._client.get_run(self._run_id).info
        logger.info("mlflow: %s, artifacts in %s; mlflow ui --backend-store-uri %s shows it", uri,
                    redact(str(run.artifact_uri)), uri)  # fmt: skip

    def _look(self) -> Held:
        """What the run holds: every line has an `epoch`."""
        last = {}
        for split in SPLITS:
            history = self._client.get_metric_history(self._run_id, f"{split}/epoch")
            if history:
                last[split] = max(metric.step for metric in history)
        return Held(last)

    def log(self, record: Mapping[str, Any]) -> None:
        if self._unsure:  # a call that failed may have arrived
            self._held = self._look()
        if record in self._held:
            return
        now, step = int(1000 * time.time()), record["step"]
        metrics = [self._metric(_key(name), float(v), now, step) for name, v in charted(record).items()]
        self._unsure = True
        self._client.log_batch(self._run_id, metrics=metrics)
        self._unsure = False

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(f"{to_json(line)}\n" for line in lines)
        self._client.log_text(self._run_id, text, f"samples/step-{step:08d}.jsonl")

    def report(self, step: int, tables: Sequence[Table]) -> None:
        for table in tables:  # as MLflow itself writes tables, which it would add to one that is there
            text = to_json({"columns": list(table.columns), "data": [list(row) for row in table.rows]})
            self._client.log_text(self._run_id, text, f"{REPORT}/{table.name}.json")

    def close(self, ended: Ended) -> None:
        self._monitor.finish()
        self._client.set_terminated(self._run_id, STATUS[ended])


def _key(name: str) -> str:
    """A name with the letters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
