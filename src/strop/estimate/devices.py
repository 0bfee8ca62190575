"""How a model lies on the devices of a run, and what they have to exchange. Floor 5.

`Devices` says how many there are and how many of them share one copy of the model. Bytes are those that one device
sends in a step; all of them send at once. Ring algorithms are counted, which reach the least that there is: to sum n
bytes over p devices each sends 2 n (p - 1) / p of them, to gather or to reduce and scatter n bytes (p - 1) / p of n
(Thakur, Rabenseifner and Gropp, 2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strop.errors import ConfigError
from strop.policy.model.from_config import Shape
from strop.policy.precision import Precision
from strop.prepared import Prepared


@dataclass(frozen=True)
class Devices:
    """count: processes that train together, one per device. shard: how many of them hold one copy of the model between
    them; 1: each has the whole model. `count` is a multiple of `shard`."""

    count: int = 1
    shard: int = 1

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.count // self.shard

    def __str__(self) -> str:
        devices = "1 device" if self.count == 1 else f"{self.count} devices"
        if self.shard == 1:
            return devices if self.count == 1 else f"a copy on each of {devices}"
        return f"fsdp on {devices}" if self.shard == self.count else f"fsdp over {self.shard} of {devices}"


ALONE = Devices()
PACKED = 0.5
"""Bytes per weight of a base in 4 bits, without its scales."""


def devices_of(prepared: Prepared) -> Devices:
    """Those of a run.

    Raises:
        ConfigError: `gpu.shard_size` does not divide their number.
    """
    gpu, count = prepared.config.gpu, prepared.num_processes
    if not gpu.fsdp:
        return Devices(count)
    shard = gpu.shard_size or count
    if count % shard:
        raise ConfigError(
            f"{shard} does not divide the number of processes, {count}",
            where="gpu.shard_size",
            expected=f"one of {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}",
            fix="leave it out to shard over all of them",
        )
    return Devices(count, shard)


def base_bytes(shape: Shape, precision: Precision) -> float:
    """Of the weights without adapters, as they are stored: what trains in the master dtype, what is frozen in the
    compute dtype, or quantised."""
    if not shape.adapters:
        return (shape.matrix + shape.others) * precision.master.itemsize
    compute = precision.compute.itemsize
    return shape.matrix * (compute if shape.matrix_bytes is None else shape.matrix_bytes) + shape.others * compute


def scales_bytes(shape: Shape) -> float:
    """Of a base in 4 bits: every device has all its scales, also where the weights are sharded."""
    if not shape.adapters or shape.matrix_bytes is None or shape.matrix_bytes >= 1:
        return 0.0
    return shape.matrix * (shape.matrix_bytes - PACKED)


def gathered_bytes(shape: Shape, precision: Precision) -> tuple[float, float]:
    """What a device gathers of a sharded model: (of one layer, in the compute dtype or quantised; of what is outside of
    layers, embedding and head, in the dtype that it is stored in)."""
    each = precision.compute.itemsize if shape.matrix_bytes is None or not shape.adapters else shape.matrix_bytes
    rest = precision.compute if shape.adapters else precision.master
    return (shape.matrix * each - scales_bytes(shape)) / shape.layers, shape.others * float(rest.itemsize)


def sent_bytes(shape: Shape, precision: Precision, devices: Devices, micro_batches: np.ndarray) -> np.ndarray:
    """[steps] bytes that one device sends in a step to the others.

    A copy on each device: gradients are summed once per step. Sharded: every micro-batch gathers the weights for the
    forward and for the backward pass, and its gradients are reduced and scattered; where there are several copies, each
    shard of the gradients is summed over these.

    Args:
        micro_batches: [steps] of each device.
    """
    gradients = float((shape.adapters or shape.matrix + shape.others) * precision.master.itemsize)
    if devices.shard == 1:
        return np.full(len(micro_batches), _summed(gradients, devices.count))
    layer, rest = gathered_bytes(shape, precision)
    gathered = 2 * (shape.layers * layer + rest + shape.adapters * precision.compute.itemsize)
    each = _scattered(gathered + gradients, devices.shard) + _summed(gradients / devices.shard, devices.replicas)
    return np.asarray(micro_batches * each)


def _summed(size: float, count: int) -> float:
    return 2 * size * (count - 1) / count


def _scattered(size: float, count: int) -> float:
    return size * (count - 1) / count
