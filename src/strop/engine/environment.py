"""What a run was made with: the content of environment.json. Floor 3.

Facts that explain a difference between two runs, and nothing else: the environment's variables are not in it, and the
command line is without its credentials.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from strop.redact import redact_arguments

PACKAGES = ("strop", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "bitsandbytes")


def describe_environment(*, seed: int, world_size: int = 1, command: Sequence[str] | None = None) -> dict[str, object]:
    """environment.json as a mapping. command: the command line; default: this process's."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "seed": seed,
        "world_size": world_size,
        "git_commit": _git_commit(),
        "command": redact_arguments(sys.argv if command is None else command),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_gib": round(d.total_memory / 2**30, 2)} for d in found]


def _git_commit() -> str | None:
    """The commit of the working folder, where it is in a git repository and git is there."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    commit = answer.stdout.strip()
    return commit if answer.returncode == 0 and len(commit) in (40, 64) else None
