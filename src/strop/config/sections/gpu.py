"""The `gpu` section of the configuration. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from strop.config.section import ListOf, Problem, Section


class GpuSection(Section):
    """Devices."""

    device_ids: ListOf[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """The GPU to use, as a list of one: this version trains on one device. null: the first one, or the CPU where there
    is none."""
    use_ddp: bool = False
    """Data parallelism over several device_ids; refused on GPUs in this version, which trains on one."""

    def problems(self) -> Iterator[Problem]:
        if self.device_ids and len(set(self.device_ids)) < len(self.device_ids):
            yield Problem(("device_ids",), f"device_ids {list(self.device_ids)} names a device twice")
