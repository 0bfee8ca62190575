"""What this computer has, found without touching a GPU: processor, memory, a GPU's rate of matrix products. Floor 1.

A GPU is asked for by its driver's tool, and taken to reach a share of the rate that its maker publishes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MFU = 0.4
"""Share of its published rate that a GPU is assumed to reach."""
PUBLISHED = (
    ("B200", 2250, 75, 8.0),
    ("H200", 989, 67, 4.8),
    ("H100", 989, 67, 3.35),
    ("A100", 312, 19.5, 2.0),
    ("L40S", 362, 91.6, 0.86),
    ("L4", 121, 30.3, 0.3),
    ("A10", 125, 31.2, 0.6),
    ("4090", 165, 82.6, 1.0),
    ("3090", 71, 35.6, 0.94),
    ("V100", 125, 15.7, 0.9),
    ("T4", 65, 8.1, 0.32),
)
"""Word of a name; dense TFLOP/s in 16 bits and in float32, TB/s, as NVIDIA's data sheets have them."""


@dataclass(frozen=True)
class Processor:
    """cores: those that this process may use. name: what tells it from processors that are faster or slower."""

    cores: int
    name: str


def processor() -> Processor:
    """This computer's. Every decision that depends on the processor asks `machine.processor()` at the time, so that
    tests can put another one in its place; how fast it multiplies is measured (policy/rates.py)."""
    return _found_processor()


@cache
def _found_processor() -> Processor:
    from torch.cpu import get_capabilities

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = sorted(f"{key} {value}" for key, value in get_capabilities().items())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # virtual machines call processors of several generations by one name
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        facts += [" ".join(line.split()) for line in first if line.startswith(("cpu family", "model", "stepping"))]
    return Processor(cores, ", ".join(facts))


BF16_CAPABILITY = 8.0
"""Compute capability from which a GPU has instructions for bfloat16."""


@dataclass(frozen=True)
class Machine:
    """kind: cpu or cuda. memory: bytes, or None. bandwidth: bytes a second, or None. name: of a GPU, or "". held: bytes
    that this process has of that memory before a run. has_bf16: whether a GPU computes bfloat16, or None."""

    kind: str
    memory: int | None
    bandwidth: float | None
    name: str = ""
    held: int = 0
    has_bf16: bool | None = None

    def rate(self, dtype: torch.dtype) -> float | None:
        """FLOP a second of matrix products in `dtype`; None: a CPU, or a GPU that is not in the table."""
        known = _known(self.name)
        return None if known is None else MFU * 1e12 * (known[1] if dtype.itemsize == 2 else known[2])

    def describe(self, dtype: torch.dtype) -> str:
        """Where the rate is from, or why there is none; "" for a CPU, which is timed instead."""
        if self.kind == "cpu":
            return ""
        if self.rate(dtype) is None:
            return f"the rate of {self.name or 'this GPU'} is not known"
        return f"{self.name}: {MFU:.0%} of its published rate assumed"


def machine_of(device: torch.device) -> Machine:
    """The machine behind a device of this computer."""
    if device.type == "cpu":
        return Machine("cpu", _installed_memory(), None, held=_held())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # torch counts these, the driver's tool all
    index = device.index or 0
    asked = [
        "nvidia-smi",
        f"--id={visible[index] if index < len(visible) and visible[index] else index}",
        "--query-gpu=name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        name, mebibytes, capability = found.strip().rsplit(", ", 2)
        memory, has_bf16 = int(mebibytes) * 2**20, float(capability) >= BF16_CAPABILITY
    except (OSError, subprocess.SubprocessError, ValueError):
        return Machine("cuda", None, None)
    known = _known(name)
    return Machine("cuda", memory, None if known is None else known[3] * 1e12 * 0.7, name, has_bf16=has_bf16)


def _known(name: str) -> tuple[str, float, float, float] | None:
    words = name.replace("-", " ").split()  # GH200 is no H200, L40 no L4
    return next((row for row in PUBLISHED if row[0] in words), None)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, now; VmHWM, at the most. Where the system does not tell, what getrusage calls the
    peak, which is that of the parent where it had more."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


@cache
def _held() -> int:
    """Once a process: what an earlier run left is free, or taken again by the next."""
    return resident("VmRSS")


_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _installed_memory() -> int | None:
    """Bytes of the machine within the limit of its container; None: not known."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
    limits = [int(text) for file in _CGROUPS if file.is_file() and (text := file.read_text().strip()).isdecimal()]
    return min([machine, *limits])
