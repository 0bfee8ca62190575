"""environment.json: the software and hardware that a run was made with. Floor 3.

It holds facts that can explain a difference between two runs, and no secrets: environment variables are left out, and
credentials are removed from the command line.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from strop.engine.checkpoint import Checkpoint
from strop.machine import processor_model
from strop.packages import installed_version
from strop.redact import redact_arguments
from strop.rundir import RunDir

log = logging.getLogger("strop")

ENVIRONMENT = "environment.json"
PACKAGES = (
    "strop",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "torchao",
)


def describe_environment(
    *, seed: int, processes: Sequence[Mapping[str, Any]], command: Sequence[str] | None = None
) -> dict[str, object]:
    """The content of environment.json.

    Args:
        processes: host, device and memory of each process, by rank.
        command: default: the command line of this process.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor_model(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "seed": seed,
        "world_size": len(processes),
        "processes": [dict(process) for process in processes],
        "git_commit": _git_commit(),
        "command": redact_arguments(sys.argv if command is None else command),
    }


COMPARED = ("python", "packages", "platform", "processor", "num_cpus", "num_threads", "devices", "cuda", "world_size")
"""What can change a result in its last digits."""


def write_environment(
    run: RunDir, saved: Checkpoint | None, *, seed: int, products: Any, processes: Sequence[Mapping[str, Any]]
) -> None:
    """Writes environment.json. A resume keeps the record of the first launch, adds its own to it, and warns about
    differences.

    Args:
        saved: the checkpoint that is resumed from.
        products: how matrix products are computed here.
        processes: host, device and memory of each process, by rank.
    """
    environment: dict[str, Any] = {**describe_environment(seed=seed, processes=processes), "products": products}
    if saved and (launch := launch_record(saved.path.parent)) is not None:
        for line in changed_since(launch, environment):
            log.warning("%s: changed since the launch, so the last digits may differ: %s", run.path, line)
        environment = resumed(launch, saved.step, environment)
    run.write_json(ENVIRONMENT, environment)


def launch_record(run_dir: Path) -> dict[str, Any] | None:
    """The environment.json of an earlier launch; None if it is missing or cannot be read."""
    try:
        found = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def record_at(launch: Mapping[str, Any], step: int) -> Mapping[str, Any]:
    """The record in force when a step was taken: that of the launch, or of the last resume before the step."""
    found = launch
    for resume in launch.get("resumes", ()):
        if isinstance(resume, Mapping) and isinstance(after := resume.get("after_step"), int) and after < step:
            found = resume
    return found


def processes_at(run_dir: Path, step: int) -> int:
    """How many processes took a step of a run; 1 where that is not known."""
    size = record_at(launch_record(run_dir) or {}, step).get("world_size")
    return size if isinstance(size, int) and size > 0 else 1


def resumed_since(run_dir: Path, step: int) -> int | None:
    """After which step the run was last resumed, if it had taken `step` by then: config.yaml is of that resume. None:
    it was not, or that is not known."""
    resumes = (launch_record(run_dir) or {}).get("resumes", ())
    after = [resume.get("after_step") for resume in resumes if isinstance(resume, Mapping)]
    return next((at for at in reversed(after) if isinstance(at, int) and at >= step), None)


def changed_since(launch: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each version, count or device that differs from the launch."""
    for name in COMPARED:
        before, after = launch.get(name), now.get(name)
        if name == "packages" and isinstance(before, Mapping) and isinstance(after, Mapping):
            both = sorted(before.keys() & after.keys())
            yield from (f"{p} {before[p]} then, {after[p]} now" for p in both if before[p] != after[p])
        elif name in launch and before != after:
            yield f"{name} {before} then, {after} now"


def resumed(launch: Mapping[str, Any], step: int, now: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the launch, unchanged, with that of one more resume added."""
    return {**launch, "resumes": [*launch.get("resumes", ()), {"after_step": step, **now}]}


def _devices() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_gib": round(d.total_memory / 2**30, 2)} for d in found]


def _git_commit() -> str | None:
    """The commit of the working folder; None outside of a git repository, or without git."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    commit = answer.stdout.strip()
    return commit if answer.returncode == 0 and len(commit) in (40, 64) else None
