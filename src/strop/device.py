"""Which device this process computes on, and which other processes it trains with. Floor 4."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from strop.config.sections import GpuSection
from strop.distributed import Place, find_place, join
from strop.errors import ConfigError
from strop.world import World

log = logging.getLogger("strop")


@contextmanager
def start_world(gpu: GpuSection) -> Iterator[World]:
    """This process among those that its launcher has started, on its device, which is the current one in the block.

    Raises:
        ConfigError: the devices or the number of processes are not those of `gpu`, or of this machine.
        TrainingError: the other processes cannot be reached.
    """
    place = find_place()
    if place is None and (wanted := num_processes(gpu)) > 1:
        raise ConfigError(
            f"the configuration asks for {wanted} processes, and this is one",
            where=f"gpu.device_ids: {list(gpu.device_ids)}" if gpu.device_ids else "gpu.num_processes",
            fix="start it by the command line (strop train), or by torchrun, which start processes",
        )
    device, notes = pick_device(gpu, place)
    for note in notes:
        log.warning(note)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # libraries that are not told a device take the current one
    world = World.alone(device) if place is None or place.size == 1 else join(place, device)
    try:
        yield world
    finally:
        world.leave()


def num_processes(gpu: GpuSection) -> int:
    """How many processes `gpu` asks for on this machine."""
    available = num_gpus()
    if not available:
        return gpu.num_processes or 1
    if (gpu.use_ddp or gpu.fsdp) and gpu.device_ids is None and gpu.num_processes is None:
        return available
    return gpu.asked_processes


def pick_device(gpu: GpuSection, place: Place | None = None) -> tuple[torch.device, list[str]]:
    """The device of this process and what has to be said about it: notes for the user, in full sentences.

    A machine without any GPU trains on its CPU whatever `gpu` says, with a note.

    Args:
        place: this process among several; None: it is alone, or the first.

    Raises:
        ConfigError: a device that is not there on a machine that has others; another number of processes than devices.
    """
    local_rank, available = place.local_rank if place else 0, num_gpus()
    if not available:
        if place and gpu.num_processes not in (None, place.local_size):
            raise _other_number(place, f"gpu.num_processes: {gpu.num_processes}")
        if place or not (gpu.device_ids or gpu.use_ddp or gpu.fsdp):
            return torch.device("cpu"), []
        given = [f"device_ids {list(gpu.device_ids)}"] if gpu.device_ids else []
        given += [f"{name} true" for name in ("use_ddp", "fsdp") if getattr(gpu, name)]
        many = f"{gpu.num_processes} processes" if gpu.num_processes else "one process"
        note = f"gpu.{', '.join(given)}: this machine has no GPU; training on its CPU, in {many}."
        return torch.device("cpu"), [note]
    ids = gpu.device_ids or tuple(range(place.local_size if place else num_processes(gpu)))
    if missing := [i for i in ids if i >= available]:
        raise ConfigError(
            f"device {missing[0]} is not there",
            where=f"gpu.device_ids: {list(ids)}" if gpu.device_ids else f"{len(ids)} processes",
            expected=f"ids from 0 to {available - 1}: this machine has {available} GPU(s), and each process takes one",
            fix="name devices that are there, or leave device_ids out to use the first",
        )
    if place and len(ids) != place.local_size:
        raise _other_number(place, f"gpu.device_ids: {list(ids)}")
    return torch.device("cuda", ids[local_rank]), []


def num_gpus() -> int:
    """GPUs of this machine that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _other_number(place: Place, where: str) -> ConfigError:
    return ConfigError(
        f"{place.local_size} processes are started on this machine",
        where=where,
        expected="as many as the configuration says, or a configuration that leaves it open",
        fix="change --nproc_per_node of torchrun, or leave the key out",
    )
