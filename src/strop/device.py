"""Which device this process computes on. Floor 2."""

from __future__ import annotations

import os

import torch

from strop.config.sections import GpuSection
from strop.errors import ConfigError


def pick_device(gpu: GpuSection) -> tuple[torch.device, list[str]]:
    """The device and what has to be said about it: notes for the user, in full sentences.

    A machine without any GPU trains on its CPU whatever `gpu` says, with a note.

    Raises:
        ConfigError: a device that is not there on a machine that has others; several devices or processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: started as several processes",
            where="environment",
            expected="one process; this version trains in one",
            fix="start `strop train` without torchrun",
        )
    ids = gpu.device_ids or ()
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not available:
        asked = ", ".join([f"device_ids {list(ids)}"] * bool(ids) + ["use_ddp true"] * gpu.use_ddp)
        notes = [f"gpu.{asked}: this machine has no GPU; training on its CPU, in one process."] if asked else []
        return torch.device("cpu"), notes
    missing = [i for i in ids if not 0 <= i < available]
    if missing:
        raise ConfigError(
            f"device {missing[0]} is not there",
            where=f"gpu.device_ids: {list(ids)}",
            expected=f"ids from 0 to {available - 1}: this machine has {available} GPU(s)",
            fix="name devices that are there, or leave device_ids out to use the first",
        )
    if len(ids) > 1 or gpu.use_ddp:
        raise ConfigError(
            f"device_ids {list(ids)}, use_ddp {gpu.use_ddp}: several devices",
            where="gpu",
            expected="one device; this version trains on one",
            fix="set gpu.device_ids to one id and gpu.use_ddp to false; raise "
            "training.gradient_accumulation_steps to keep the effective batch",
        )
    return torch.device("cuda", ids[0] if ids else 0), []
