"""A `World` of several processes, over torch.distributed. Floor 3.

    control     gloo, on CPUs: counts, flags, objects; one small all-gather each, and another one for long values
    tensors     NCCL between GPUs, gloo between CPUs: scores, gradients, weights

Control calls wait without a time limit: a process that prepares data or writes a checkpoint may take long, and one that
is gone breaks the connection.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from strop.errors import ConfigError, GoneError, Interrupted, LostError, TrainingError
from strop.heartbeat import Heartbeat
from strop.policy.memory_attempts import is_out_of_memory
from strop.terminal import complain
from strop.world import World

FOREVER = timedelta(days=365)
HEADER = struct.Struct("<qq")
"""Bytes of a message, and bytes of the tensors that belong to it."""
SHORT_BYTES = 512
"""A message of at most so many bytes goes with its header."""
BUCKET_BYTES = 2**26
"""Gradients are copied into one tensor of about this size and summed together; larger ones are summed in place."""
ALIGNED = 16
SECONDS_TO_TELL = 10.0
"""How long a process that failed waits for the others to take its message. If they do not, they are in a collective
call of a device mesh, where it cannot reach them."""


class Place(NamedTuple):
    """Which process this is, as its launcher says. local_size: processes on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def find_place(environment: Mapping[str, str] | None = None) -> Place | None:
    """Which process this is, from the environment variables of torchrun or strop's own launcher; None: it is alone.

    Raises:
        ConfigError: another launcher started it, or its address is not usable.
    """
    variables = os.environ if environment is None else environment
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        _refuse_other_launchers(variables)
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: variables.get(name, "") for name in names}
    if not all(value.isdecimal() for value in found.values()):
        listed = ", ".join(f"{name}={value}" if value else f"{name} is missing" for name, value in found.items())
        raise ConfigError(listed, where="environment", expected=f"all of {', '.join(names)}", fix=_by_torchrun())
    place = Place(*(int(found[name]) for name in names))
    if not (place.rank < place.size and place.local_rank < place.local_size <= place.size):
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ConfigError(
            f"these variables of the launcher contradict each other: {listed}",
            where="environment",
            expected="RANK below WORLD_SIZE, LOCAL_RANK below LOCAL_WORLD_SIZE",
            fix=_by_torchrun(),
        )
    return place


def is_restarted(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun has started this process again, after a failure of the same launch (`--max-restarts`)."""
    variables = os.environ if environment is None else environment
    count = variables.get("TORCHELASTIC_RESTART_COUNT", "")
    return "RANK" in variables and count.isdecimal() and int(count) > 0


REFUSED_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}
"""Launcher -> the variables with the number of processes that it started, and with the number of this one."""


def _refuse_other_launchers(variables: Mapping[str, str]) -> None:
    for launcher, (size, rank) in REFUSED_LAUNCHERS.items():
        if (count := variables.get(size, "")).isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{launcher} has started {count} processes, of which this is number {variables.get(rank, '?')}",
                where="environment",
                expected="one process per machine, which is torchrun",
                fix=_by_torchrun("srun --ntasks-per-node=1 " if launcher == "srun" else ""),
            )


def _by_torchrun(before: str = "") -> str:
    return (
        f"{before}torchrun --nnodes=MACHINES --nproc_per_node=PROCESSES_PER_MACHINE --rdzv_backend=c10d "
        "--rdzv_endpoint=FIRST_MACHINE:29500 -m strop train --config FILE"
    )


def join(place: Place, device: torch.device) -> World:
    """Connects to the other processes. Returns when all of them are there.

    Raises:
        TrainingError: they cannot be reached.
    """
    try:
        store, _, _ = next(rendezvous("env://"))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        heartbeat = Heartbeat(address, port, place.rank, place.size)
        store = heartbeat.attempt.keys_in(store)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=FOREVER)
        control = dist.group.WORLD
        tensors = dist.new_group(backend="nccl") if device.type == "cuda" else control
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise TrainingError(
            f"process {place.rank} of {place.size} cannot reach the others: {str(error).partition(chr(10))[0]}",
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            fix="on several machines, look whether this address and port can be reached from each of them, and which "
            "network interface is taken (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        ) from error
    return _Joined(device, place.rank, place.size, place.local_rank, place.local_size, heartbeat, control, tensors)


@dataclass(frozen=True)
class _Joined(World):
    """One of the processes that torch.distributed connects. control, tensors: its process groups."""

    heartbeat: Heartbeat | None = field(default=None, repr=False)
    control: Any = field(default=None, repr=False)
    tensors: Any = field(default=None, repr=False)

    def _exchange(self, value: Any) -> list[Any]:
        message, own = _pack(value)
        first = torch.zeros(HEADER.size + SHORT_BYTES, dtype=torch.uint8)
        is_short = len(message) <= SHORT_BYTES
        start = HEADER.pack(len(message), own.nbytes) + (message if is_short else b"")
        first[: len(start)] = _bytes(start)
        with self.connected():
            firsts = [part.numpy().tobytes() for part in self._all_gather(first, self.control)]
            headers = [HEADER.unpack_from(part) for part in firsts]
            long_sizes = [size if size > SHORT_BYTES else 0 for size, _ in headers]
            long = self._bulk(_bytes(message), long_sizes, self.control)
            blobs = self._bulk(own.to(self.device), [size for _, size in headers], self.tensors)
        found = []
        for rank, (part, (size, _)) in enumerate(zip(firsts, headers, strict=True)):
            text = long[rank].numpy().tobytes() if long_sizes[rank] else part[HEADER.size : HEADER.size + size]
            found.append(value if rank == self.rank else _unpack(text, blobs[rank]))
        return found

    def _bulk(self, own: Tensor, sizes: Sequence[int], group: Any) -> list[Tensor]:
        """The bytes of each process, by rank. If only one process has any, it sends them to the others.

        Args:
            own: [bytes] of this process.
            sizes: the number of bytes of each process.
        """
        nothing = own.new_empty(0)
        giving = [rank for rank, size in enumerate(sizes) if size]
        if not giving:
            return [nothing] * self.size
        if len(giving) == 1:
            (giver,) = giving
            given = own if giver == self.rank else own.new_empty(sizes[giver])
            dist.broadcast(given, giver, group=group)
            return [given if rank == giver else nothing for rank in range(self.size)]
        padded = own.new_zeros(max(sizes))
        padded[: sizes[self.rank]] = own[: sizes[self.rank]]
        return [part[:size] for part, size in zip(self._all_gather(padded, group), sizes, strict=True)]

    def _all_gather(self, own: Tensor, group: Any) -> list[Tensor]:
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everywhere, own, group=group)
        return everywhere

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        own = list(parameters)
        somewhere = self.sum([int(p.grad is not None) for p in own])
        with self.connected():
            for parameter, count in zip(own, somewhere, strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in own if p.grad is not None]
            for bucket in buckets(gradients):
                self._sum(bucket)

    def _sum(self, bucket: Sequence[Tensor]) -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=self.tensors)
            return
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=self.tensors)
        for gradient, part in zip(bucket, torch.split(flat, [gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        self.any(False)  # rank 0 may come to `tell` instead
        with self.connected():
            for tensor in tensors:
                there = tensor.detach().to(self.device).contiguous()
                dist.broadcast(there, 0, group=self.tensors)
                if not self.is_main:
                    tensor.detach().copy_(there)

    def doing(self, what: str) -> None:
        assert self.heartbeat is not None
        self.heartbeat.doing = what

    def leave(self) -> None:
        assert self.heartbeat is not None
        self.heartbeat.stop()
        dist.destroy_process_group()

    def mesh(self, shard_size: int | None) -> DeviceMesh:
        size = shard_size or self.size
        if self.size % size:
            raise ConfigError(
                f"{size} does not divide the number of processes, {self.size}",
                where="gpu.shard_size",
                expected=f"one of {', '.join(str(n) for n in range(1, self.size + 1) if self.size % n == 0)}",
                fix="leave it out to shard over all of them",
            )
        assert self.heartbeat is not None
        self.any(False)  # a process may come to `tell` instead, and the groups below wait for all
        self.heartbeat.has_mesh = True
        shape, names = (
            ((self.size,), ("shard",)) if size == self.size else ((self.size // size, size), ("replicate", "shard"))
        )
        ranks = torch.arange(self.size).view(shape)
        lines = [ranks.movedim(dim, -1).reshape(-1, count).tolist() for dim, count in enumerate(shape)]
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        groups = [self._own_of(dimension, backend) for dimension in lines]
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], self.device.type, mesh_dim_names=names)
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    def _own_of(self, lines: Sequence[Sequence[int]], backend: str) -> Any:
        """Makes a group of each line of ranks; returns the one that this process is in."""
        groups = [dist.new_group(line, FOREVER, backend) for line in lines]
        return next(group for group, line in zip(groups, lines, strict=True) if self.rank in line)

    def tell(self, error: BaseException, *, memory: bool = False) -> None:
        assert self.heartbeat is not None
        if not self.heartbeat.has_mesh or isinstance(error, Interrupted):  # all stop together, after the same step
            super().tell(error, memory=memory)
            return
        told = Event()
        Thread(target=self._end_unheard, args=(error, told), daemon=True).start()
        try:
            super().tell(error, memory=memory)
        finally:
            told.set()

    def beside(self) -> World:
        self.any(False)  # a process may come to `tell` instead
        control = dist.new_group(timeout=FOREVER, backend="gloo")
        place = (self.rank, self.size, self.local_rank, self.local_size)
        return _Beside(self.device, *place, self.heartbeat, control, control)

    def _end_unheard(self, error: BaseException, told: Event) -> None:
        """Ends this process if the others do not come. Rank 0 comes, however late, once it has said that it is
        ending."""
        assert self.heartbeat is not None
        while not told.wait(SECONDS_TO_TELL):
            if not self.heartbeat.main_is_ending():
                self._end_alone(error)

    def _end_alone(self, error: BaseException) -> None:
        complain(f"process {self.rank} of {self.size} failed: {error}")
        os._exit(1)

    @contextmanager
    def connected(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            assert self.heartbeat is not None
            first_line = str(error).strip().partition("\n")[0]
            if is_out_of_memory(error):
                self._end_alone(MemoryError(f"memory ran out while it exchanged values with the others: {first_line}"))
            fix = "start the same command again with --resume"
            if gone := self.heartbeat.gone():
                raise GoneError(gone, fix=fix) from error
            raise LostError(f"process {self.rank} has lost the others: {first_line}", fix=fix) from error


@dataclass(frozen=True)
class _Beside(_Joined):
    """As a thread of this process sees the threads of the others. They are never inside the collective calls of a
    mesh, so `tell` reaches them, however late they come."""

    def tell(self, error: BaseException, *, memory: bool = False) -> None:
        World.tell(self, error, memory=memory)

    def doing(self, what: str) -> None:
        pass

    def leave(self) -> None:
        pass


def buckets(gradients: Iterable[Tensor], limit: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """Divides gradients, in their order, into buckets of one dtype and at most `limit` bytes. A larger gradient is a
    bucket by itself."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (bucket[0].dtype != gradient.dtype or size + gradient.nbytes > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


class _Packer(pickle.Pickler):
    """Pickles everything but tensors, which are collected, and whose places stand in the pickle."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.parts: list[Tensor] = []
        self._num_bytes = 0

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            return None
        part = thing.detach().contiguous().flatten().view(torch.uint8)
        place = (self._num_bytes, thing.dtype, tuple(thing.shape))
        self.parts += [part, part.new_zeros(-part.nbytes % ALIGNED)]
        self._num_bytes += part.nbytes + -part.nbytes % ALIGNED
        return place


def _pack(value: Any) -> tuple[bytes, Tensor]:
    """A pickle, and [bytes] of the tensors that are in `value`, on their device."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    devices = {part.device for part in packer.parts}
    parts = packer.parts if len(devices) < 2 else [part.cpu() for part in packer.parts]
    return file.getvalue(), torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Tensor) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Tensor:
        start, dtype, shape = place
        stop = start + dtype.itemsize * torch.Size(shape).numel()
        return self._tensors[start:stop].view(dtype).view(shape)


def _unpack(message: bytes, tensors: Tensor) -> Any:
    """What `_pack` was given. Another process of the same run wrote it."""
    return _Unpacker(io.BytesIO(message), tensors).load()
