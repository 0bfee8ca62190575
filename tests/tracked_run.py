"""A run as trackers see it: killed after step 8, resumed from the checkpoint of step 5; and readers of what they hold.

`python tracked_run.py FOLDER KIND` is its first process, which kills itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strop.config import RunConfig, load_config
from strop.rundir import RunDir
from strop.trackers.fan_out import Trackers
from strop.trackers.open_trackers import open_trackers

STEPS, CHECKPOINT, KILLED = 12, 5, 8
Series = dict[str, list[tuple[int, float]]]
"""By metric, (step, value) as often as it was logged."""


def config(*report_to: str, **more: Any) -> RunConfig:
    return load_config(
        overrides={
            "models": [{"huggingface_id": "org/a", "name": "model"}],
            "logging.report_to": list(report_to),
            "training.learning_rate": 0.25,
            **more,
        }
    )


def lines(first: int, last: int) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl: one per step, an evaluation every fourth."""
    for step in range(first, last + 1):
        shared = {"step": step, "epoch": step / 10}
        yield {**shared, "split": "train", "loss": 1 / step, "rewards/len#2/mean": float(step), "kind": "text"}
        if step % 4 == 0:
            yield {**shared, "split": "eval", "loss": 2 / step}


def process(folder: Path, chosen: RunConfig, *, resumed: bool = False, last: int = STEPS) -> Trackers:
    """One process of the run, up to where it ends."""
    run = RunDir.open(folder, resume=resumed, overwrite=False)
    trackers = open_trackers(chosen, run, name="model", resumed_at=CHECKPOINT if resumed else None)
    if resumed:
        run.rewind(CHECKPOINT)
        trackers.catch_up(run.metrics.read())
    for line in lines(CHECKPOINT + 1 if resumed else 1, last):
        if line["split"] == "eval":
            trackers.show(line["step"], samples(line["step"]))
        run.append(run.metrics, line)
        trackers.log(line)
    run.close()
    return trackers


def samples(step: int) -> list[dict[str, Any]]:
    """The lines of samples.jsonl of a step."""
    return [{"step": step, "prompt": f"a | `b` {i}", "completion": f"<b>answer</b> {step}\n."} for i in range(2)]


def begin_again(folder: Path, chosen: RunConfig) -> Trackers:
    """A process that finds no checkpoint and does all steps again."""
    run = RunDir.open(folder, resume=True, overwrite=False)
    trackers = open_trackers(chosen, run, name="model", resumed_at=None)
    run.rewind(-1)
    trackers.catch_up(run.metrics.read())
    for line in lines(1, STEPS):
        run.append(run.metrics, line)
        trackers.log(line)
    run.close()
    return trackers


def expected() -> Series:
    """By metric, what a tracker should hold of the whole run."""
    found: Series = {}
    for line in lines(1, STEPS):
        for name in ("epoch", "loss", "rewards/len#2/mean"):
            if name in line:
                found.setdefault(f"{line['split']}/{name}", []).append((line["step"], line[name]))
    return found


def identity(run: Path, kind: str) -> dict[str, str]:
    """What a tracker wrote down about the run."""
    return json.loads((run / "trackers.json").read_text())["identities"][kind]


def wandb_records(logs: Path) -> list[dict[str, Any]]:
    """What all offline files of a run hold, as `wandb leet inspect --json` prints it, the oldest file first."""
    records = []
    for file in sorted(logs.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        records += [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    return records


def sorted_series(rows: list[tuple[str, int, float]]) -> Series:
    found: Series = {}
    for name, step, value in rows:
        found.setdefault(name, []).append((step, value))
    return {name: sorted(values) for name, values in found.items()}


if __name__ == "__main__":
    process(Path(sys.argv[1]), config(sys.argv[2]), last=KILLED)
    os.kill(os.getpid(), 9)
