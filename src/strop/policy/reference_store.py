"""Reference log-probs on disk, found again by the model that gave them and by what was scored together. Floor 2.

One file a model, `references/{hash}.logps` in the cache folder, with a lock beside it, to which records are only added:
one a micro-batch, since what is scored together decides the last bits. A record's key is a hash of the prompts and
completions in it. The model's hash covers what `model_identity` lists: weights, adapters, configuration, dtypes, the
head, the kind of rows, the device, its threads and instructions, the releases of the libraries that compute; so runs
with another beta, loss or learning rate share it.

    record: b"SRL2", key [16], number of bytes [u32], crc32 of key and values [u32], values (float32 or float64)

All numbers are little-endian. Writers take a lock. What a killed one has left half-written does not have its checksum:
readers stop there, and the next writer cuts it off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from strop import machine
from strop.cachedir import cache_folder, cannot_keep
from strop.policy.kernels import product_rates
from strop.policy.model.identity import numbers_of
from strop.policy.policy import Policy
from strop.policy.precision import short_name

log = logging.getLogger("strop")

FORMAT = 3
"""1 had a record per completion, scored beside whatever was missing then; 2 other hashes of completions."""
PATIENCE = 10.0
"""Seconds that another process may write before it is said."""
_MAGIC = b"SRL2"
_HEAD = struct.Struct("<4s16sII")


class ReferenceStore:
    """The file of one model; `dtype` is that of the values."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, *, must_keep: bool = False) -> None:
        self.path, self._must_keep = path, must_keep
        self._numpy = np.dtype("<f8" if dtype == torch.float64 else "<f4")
        self._lock = FileLock(f"{path}.lock")
        self._end = 0  # up to here the file is known to be whole
        self._writable = True

    @classmethod
    def of(cls, policy: Policy, weights: str, *, must_keep: bool = False) -> ReferenceStore:
        """The store of a policy as it is now. weights: their `weights_hash`. must_keep: not to be able to write is an
        error, and not only said.

        Raises:
            ConfigError: its folder must be written and cannot.
        """
        identity = model_identity(policy, weights)
        name = hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()
        folder = cache_folder("references", must_keep=must_keep)
        return cls(folder / f"{name}.logps", policy.precision.master, must_keep=must_keep)

    def append(self, key: bytes, values: NDArray[Any]) -> None:
        """Add what was scored. What cannot be written is said once.

        Args:
            key: 16 bytes that stand for the micro-batch.
            values: [scored tokens] of it.

        Raises:
            ConfigError: it cannot be written and must be.
        """
        if not self._writable:
            return
        data = values.astype(self._numpy).tobytes()
        record = _HEAD.pack(_MAGIC, key, len(data), zlib.crc32(key + data)) + data
        try:
            try:
                self._add(record)
            except FileNotFoundError:  # the cache may be deleted at any time, this one too
                self._add(record)
        except OSError as error:
            self._give_up(error)

    def _add(self, record: bytes) -> None:
        with self._alone(), self.path.open("ab") as file:
            self._cut_tail(file)
            file.write(record)
            self._end = file.tell()

    def clear(self) -> None:
        """Forget everything, for all runs."""
        try:
            with self._alone():
                self.path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)
        self._end = 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """With the lock; where another process keeps it, that is said."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            log.warning("%s: another process is writing, and is waited for", self.path)
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _give_up(self, error: OSError) -> None:
        self._writable = False
        problem = error.strerror or str(error)
        if self._must_keep:
            raise cannot_keep(str(self.path), problem) from error
        log.warning("%s cannot be written (%s): reference log-probs are kept for this run only", self.path, problem)

    def read(self, wanted: Set[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        """(key, [scored tokens] log-probs) of those records that are here, as they were written first."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s cannot be read (%s): reference log-probs are scored", self.path, error.strerror or error)
            return
        met: set[bytes] = set()
        with file:
            if not os.fstat(file.fileno()).st_size:
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for key, start, stop in _records(data, 0):
                    self._end = stop
                    if key in wanted and key not in met:
                        met.add(key)
                        yield key, np.frombuffer(data[start:stop], self._numpy)

    def _cut_tail(self, file: BinaryIO) -> None:
        """Leave whole records only, so that what is added can be read."""
        size = os.fstat(file.fileno()).st_size
        if size == self._end:
            return
        end = 0
        if size:
            with self.path.open("rb") as old, mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ) as data:
                # the known end first; where no record begins there, the file may be another one by now
                for start in (self._end, 0):
                    end = end or max((stop for _, _, stop in _records(data, start)), default=0)
        if end < size:
            log.warning("%s: %d bytes at its end are not whole and are cut off", self.path, size - end)
            file.truncate(end)
            file.seek(end)


def _records(data: mmap.mmap, position: int) -> Iterator[tuple[bytes, int, int]]:
    """(key, start, stop) of the values of each record, up to the first that is not whole."""
    while position + _HEAD.size <= len(data):
        magic, key, length, checksum = _HEAD.unpack_from(data, position)
        start = position + _HEAD.size
        position = start + length
        if magic != _MAGIC or position > len(data) or zlib.crc32(key + data[start:position]) != checksum:
            return
        yield key, start, position


def model_identity(policy: Policy, weights: str) -> dict[str, object]:
    """Everything about a policy that its log-probs depend on, to the last bit as far as it can be known: also what
    decides the order of additions, which kernels choose by."""
    on_cpu = policy.device.type == "cpu"
    return {
        "format": FORMAT,
        "weights": weights,
        "config": numbers_of(policy.loaded_config.to_dict()),
        "compute": short_name(policy.precision.compute),
        "head": [short_name(policy.head_dtype), str(policy.transform)],
        "rows": f"shared, {policy.attention_kernel}" if policy.share_prefix else f"plain, {policy.plain_attention}",
        "device": _processor() if on_cpu else [policy.device.type, torch.cuda.get_device_name(policy.device)],
        "libraries": [torch.__version__, transformers.__version__],
        "products": product_rates.ways(policy.precision.compute) if on_cpu else None,
    }


def _processor() -> list[object]:
    """Of a CPU, what its kernels are chosen by."""
    return ["cpu", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), machine.processor().name]
