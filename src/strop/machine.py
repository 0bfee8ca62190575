"""What this computer has, found without touching a GPU: processor, memory, a GPU's rate of matrix products. Floor 1.

A GPU is asked for by its driver's tool, and taken to reach a share of the rate that its maker publishes.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from strop.errors import ConfigError

if TYPE_CHECKING:
    import torch

MFU = 0.4
"""Share of its published rate that a GPU is assumed to reach."""


class Gpu(NamedTuple):
    """What is known of a GPU by a word of its name: dense TFLOP/s in 16 bits and in float32 and TB/s, as NVIDIA's data
    sheets have them; GiB, as its driver's tool shows them; GB/s to the other GPUs of its machine, one way, by NVLink
    where it has that, else by PCIe; whether it has instructions for bfloat16."""

    word: str
    low: float
    full: float
    terabytes: float
    gib: float
    link: float
    has_bf16: bool = True


GPUS = (
    Gpu("B200", 2250, 75, 8.0, 179, 900),
    Gpu("H200", 989, 67, 4.8, 140, 450),
    Gpu("H100", 989, 67, 3.35, 79.6, 450),
    Gpu("A100", 312, 19.5, 2.0, 80, 300),
    Gpu("L40S", 362, 91.6, 0.86, 45, 32),
    Gpu("L4", 121, 30.3, 0.3, 22.5, 32),
    Gpu("A10", 125, 31.2, 0.6, 22.5, 32),
    Gpu("4090", 165, 82.6, 1.0, 24, 32),
    Gpu("3090", 71, 35.6, 0.94, 24, 32),
    Gpu("V100", 125, 15.7, 0.9, 16, 150, has_bf16=False),
    Gpu("T4", 65, 8.1, 0.32, 15, 16, has_bf16=False),
)
NETWORK = 50.0
"""GB/s, one way, that each GPU is assumed to have to those of other machines: a 400 Gb/s adapter each."""
GPUS_PER_MACHINE = 8
"""More devices than this are taken to be on several machines."""
LINK_SHARE = 0.7
"""Share of a link's published rate that collective operations are assumed to reach."""


@dataclass(frozen=True)
class Processor:
    """cores: those that this process may use. name: what tells it from processors that are faster or slower."""

    cores: int
    name: str


def processor() -> Processor:
    """This computer's. Every decision that depends on the processor asks `machine.processor()` at the time, so that
    tests can put another one in its place; how fast it multiplies is measured (policy/kernels/product_rates.py)."""
    return _found_processor()


@cache
def _found_processor() -> Processor:
    from torch.cpu import get_capabilities

    facts = sorted(f"{key} {value}" for key, value in get_capabilities().items())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # virtual machines call processors of several generations by one name
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
        facts += [" ".join(line.split()) for line in first if line.startswith(("cpu family", "model", "stepping"))]
    return Processor(num_cores(), ", ".join(facts))


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_model() -> str | None:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


BF16_CAPABILITY = 8.0
"""Compute capability from which a GPU has instructions for bfloat16."""


@dataclass(frozen=True)
class Machine:
    """kind: cpu or cuda. memory: bytes, or None. bandwidth: bytes per second, or None. name: of a GPU, or "". held:
    bytes that this process has of that memory before a run. has_bf16: whether a GPU computes bfloat16, or None."""

    kind: str
    memory: int | None
    bandwidth: float | None
    name: str = ""
    held: int = 0
    has_bf16: bool | None = None

    def rate(self, dtype: torch.dtype) -> float | None:
        """FLOP a second of matrix products in `dtype`; None: a CPU, or a GPU that is not in the table."""
        known = _known(self.name)
        return None if known is None else MFU * 1e12 * (known.low if dtype.itemsize == 2 else known.full)

    def link(self, devices: int) -> float | None:
        """Bytes a second that each of so many of these devices sends to the others; None: not known."""
        known = _known(self.name)
        if known is None:
            return None
        return LINK_SHARE * 1e9 * (known.link if devices <= GPUS_PER_MACHINE else min(known.link, NETWORK))

    def shared_by(self, processes: int) -> Machine:
        """What one of so many processes of this computer has of it: a GPU each, or a share of the memory."""
        if self.kind != "cpu" or self.memory is None:
            return self
        return replace(self, memory=self.memory // processes)

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
        return Machine("cpu", installed_memory(), None, held=_held())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # torch counts these, the driver's tool all
    index = device.index or 0
    asked = [
        "nvidia-smi",
        f"--id={visible[index] if index < len(visible) and visible[index] else index}",
        "--query-gpu=name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(asked, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout
        name, mebibytes, capability = found.strip().rsplit(", ", 2)
        memory, has_bf16 = int(mebibytes) * 2**20, float(capability) >= BF16_CAPABILITY
    except (OSError, subprocess.SubprocessError, ValueError):
        return Machine("cuda", None, None)
    known = _known(name)
    return Machine("cuda", memory, None if known is None else _bandwidth(known), name, has_bf16=has_bf16)


def machine_named(name: str) -> Machine:
    """Another machine than this one, by the name of its GPU, or `cpu`, whose memory is then this one's.

    Raises:
        ConfigError: no GPU of the table has this name.
    """
    if name.lower() == "cpu":
        return Machine("cpu", installed_memory(), None, held=_held())
    known = _known(name.upper())
    if known is None:
        raise ConfigError(
            f"there is no device {name[:40]!r}",
            where="--device",
            expected=f"cpu, {', '.join(gpu.word.lower() for gpu in GPUS)}",
            fix="name one of them, and its memory by --device-memory if it has another",
        )
    return Machine("cuda", int(known.gib * 2**30), _bandwidth(known), known.word, has_bf16=known.has_bf16)


_UNITS = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}


def bytes_of(text: str) -> int:
    """A size with its unit, such as 24GiB.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise ConfigError(
            f"--device-memory is {text[:40]!r}", expected="a number with a unit: GiB, GB, MiB or MB", fix="write 24GiB"
        )
    return int(float(match[1]) * unit)


def _bandwidth(gpu: Gpu) -> float:
    return gpu.terabytes * 1e12 * 0.7


def _known(name: str) -> Gpu | None:
    words = name.replace("-", " ").split()  # GH200 is no H200, L40 no L4
    return next((gpu for gpu in GPUS if gpu.word in words), None)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, now; VmHWM, at the most. Where the system does not tell, what getrusage calls the
    peak, which is that of the parent where it had more."""
    status = Path("/proc/self/status")
    if not status.exists():
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8", errors="replace").splitlines())
    return int(lines[name].split()[0]) * 1024


@cache
def _held() -> int:
    """Once a process: what an earlier run left is free, or taken again by the next."""
    return resident("VmRSS")


_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def installed_memory() -> int | None:
    """Bytes of the machine within the limit of its container; None: not known."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
    limits = [
        int(text)
        for file in _CGROUPS
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdecimal()
    ]
    return min([machine, *limits])
