"""Names of the files of a run, in its folder and in that of its logs. Floor 0."""

from __future__ import annotations

import re

PLAN = "plan.json"
PAIRS = "pairs.json"
FORECAST = "forecast.json"
RESULT = "result.json"
FAILURE = "failure.json"
REPORT = "report.html"
FINDINGS = "findings.json"
ROLLOUTS = "rollouts.jsonl"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
TRACKERS = "trackers.json"
SAMPLES = "samples.jsonl"
RECORDS = (
    "config.yaml",
    "environment.json",
    PLAN,
    "data.json",
    METRICS,
    LEDGER,
    "rejected.jsonl",
    PAIRS,
    FORECAST,
    FAILURE,
    RESULT,
    ROLLOUTS,
    SAMPLES,
)
"""What is written down of a run while it goes on."""
SERVED = "served"
"""A folder with the adapter that a server samples with, while the run goes on."""
MARGINS_LOG = "margins_log.jsonl"
"""In the folder of the margins, as are the arrays of `margins_array`."""
RUN_FILES = (*RECORDS, TRACKERS, REPORT, FINDINGS)


def margins_array(epoch: int, step: int) -> str:
    """The name of the array of a step of an epoch, both counted from 0."""
    return f"epoch_{epoch:03d}/step_{step:05d}.npy"


EVALUATIONS = "evaluations"
"""In the folder of the logs: the losses of validation rows."""
_ROW_LOSSES = re.compile(r"step_([0-9]{5,18})\.npy")


def row_losses_array(step: int) -> str:
    """The name of the array of an evaluation after `step`."""
    return f"step_{step:05d}.npy"


def step_of_row_losses(name: str) -> int | None:
    """The step of an array of `row_losses_array`; None for other names."""
    match = _ROW_LOSSES.fullmatch(name)
    return int(match[1]) if match else None
