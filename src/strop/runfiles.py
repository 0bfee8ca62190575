"""Names of the files of a run, in its folder. Floor 0."""

from __future__ import annotations

PLAN = "plan.json"
PAIRS = "pairs.json"
RESULT = "result.json"
FAILURE = "failure.json"
REPORT = "report.html"
FINDINGS = "findings.json"
ROLLOUTS = "rollouts.jsonl"
RECORDS = (
    "config.yaml",
    "environment.json",
    PLAN,
    "data.json",
    "metrics.jsonl",
    "rejected.jsonl",
    PAIRS,
    FAILURE,
    RESULT,
    ROLLOUTS,
)
"""What is written down of a run while it goes on."""
RUN_FILES = (*RECORDS, REPORT, FINDINGS)
