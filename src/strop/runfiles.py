"""Names of the files of a run, in its folder and in that of its logs. Floor 0."""

from __future__ import annotations

PLAN = "plan.json"
PAIRS = "pairs.json"
RESULT = "result.json"
FAILURE = "failure.json"
REPORT = "report.html"
FINDINGS = "findings.json"
ROLLOUTS = "rollouts.jsonl"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
TRACKERS = "trackers.json"
RECORDS = (
    "config.yaml",
    "environment.json",
    PLAN,
    "data.json",
    METRICS,
    LEDGER,
    "rejected.jsonl",
    PAIRS,
    FAILURE,
    RESULT,
    ROLLOUTS,
)
"""What is written down of a run while it goes on."""
MARGINS_LOG = "margins_log.jsonl"
"""In the folder of the margins, as are the arrays of `margins_array`."""
RUN_FILES = (*RECORDS, TRACKERS, REPORT, FINDINGS)


def margins_array(epoch: int, step: int) -> str:
    """The name of the array of a step of an epoch, both counted from 0."""
    return f"epoch_{epoch:03d}/step_{step:05d}.npy"
