"""The devices of all processes: what they are, how much memory they have and took. Floor 3."""

from __future__ import annotations

import socket
from typing import Any

import torch

from strop.machine import installed_memory, processor_model, resident
from strop.world import World

GIB = 2**30


def device_facts(device: torch.device) -> dict[str, Any]:
    """Host, name and memory (GiB, or None) of the device of this process."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, memory = found.name, found.total_memory
    else:
        name, memory = processor_model() or "cpu", installed_memory() or 0
    return {"host": socket.gethostname(), "device": name, "memory_gib": round(memory / GIB, 2) if memory else None}


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process: allocated on the GPU, or, on a CPU, the largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resident("VmHWM") / GIB


class DeviceMemory:
    """What a log line says of the memory of all processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_first = True

    def line(self) -> dict[str, Any]:
        """`peak_memory_gib`: of the process with the most. With several processes, the peak of each by its rank, and in
        the first line name and memory of its device. A collective call."""
        world = self._world
        own = peak_memory_gib(world.device)
        if world.size == 1:
            return {"peak_memory_gib": own}
        facts = device_facts(world.device) if self._is_first else {}
        self._is_first = False
        found: dict[str, Any] = {}
        peaks = []
        for rank, (peak, there) in enumerate(world.gather((own, facts))):
            peaks.append(peak)
            found[f"peak_memory_gib/rank_{rank}"] = peak
            found |= {f"{name}/rank_{rank}": value for name, value in there.items()}
        return {"peak_memory_gib": max(peaks), **found}
