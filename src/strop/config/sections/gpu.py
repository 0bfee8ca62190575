"""The `gpu` section of the configuration. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from strop.config.base_section import ListOf, Problem, Section


class GpuSection(Section):
    """Devices."""

    device_ids: ListOf[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """The GPUs to train on, one process each, which `strop train` starts. null: the first one, or under torchrun one
    per process; the CPU where there is none."""
    use_ddp: bool = False
    """Data parallelism: every process has the whole model and a share of each step. Several processes train like this
    unless fsdp is set; without device_ids and num_processes, true takes all GPUs of the machine."""
    fsdp: bool = False
    """Sharding (FSDP): every process holds a part of the weights, of their gradients and of the optimizer's state, and
    each layer is gathered while it computes. For models that do not fit on one device. Without device_ids and
    num_processes, true takes all GPUs of the machine."""
    shard_size: int | None = Field(default=None, gt=0)
    """With fsdp: how many processes share one copy of the model; such groups of processes are replicas of each other.
    It must divide the number of processes, and is best the number of GPUs per machine. null: all processes."""
    num_processes: int | None = Field(default=None, gt=0, le=1024)
    """Processes on this machine, which `strop train` starts; on a CPU they share its cores. null: one per device_id,
    or one; under torchrun as many as it starts."""

    @property
    def asked_processes(self) -> int:
        """How many processes a machine with enough devices is asked for."""
        return len(self.device_ids) if self.device_ids else self.num_processes or 1

    def problems(self) -> Iterator[Problem]:
        ids, count = self.device_ids, self.num_processes
        if ids and len(set(ids)) < len(ids):
            yield Problem(("device_ids",), f"device_ids {list(ids)} names a device twice")
        if ids and count not in (None, len(ids)):
            yield Problem(
                ("num_processes", "device_ids"),
                f"num_processes is {count}, and device_ids names {len(ids)} devices",
                "one process per device",
                "leave num_processes out",
            )
        if self.fsdp and self.use_ddp:
            yield Problem(
                ("fsdp", "use_ddp"),
                "fsdp and use_ddp are both true",
                "fsdp shards the model, use_ddp keeps a whole one in every process",
                "set one of them",
            )
        if self.shard_size is not None and not self.fsdp:
            yield Problem(
                ("shard_size", "fsdp"),
                f"shard_size is {self.shard_size}, and nothing is sharded",
                "fsdp: true beside it",
                "set fsdp: true, or leave shard_size out",
            )
