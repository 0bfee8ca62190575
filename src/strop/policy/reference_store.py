"""Reference log-probs on disk, which later runs with the same reference and the same rows reuse. Floor 2.

There is one file per model, `references/{hash}.logps` in the cache folder, with a lock file beside it. Records are only
appended, one per micro-batch, because the last bits of a log-prob depend on what is scored together. The key of a
record is a hash of its prompts and completions. The hash of the model covers everything in `model_identity`: weights,
adapters, configuration, dtypes, head, row layout, device, threads, processor instructions and versions of libraries.
Runs that differ only in beta, loss or learning rate share the file.

    record: b"SRL2", key [16], number of bytes [u32], crc32 of key and values [u32], values (float32 or float64)

All numbers are little-endian. Writers take the lock. A record that a killed writer left incomplete fails its checksum:
readers stop there, and the next writer truncates the file to that point.
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
from strop.policy.model.model_hashes import numbers_of
from strop.policy.policy import Policy
from strop.readable import short_name

log = logging.getLogger("strop")

FORMAT = 3
"""Part of `model_identity`, so that files of earlier formats are not found."""
PATIENCE = 10.0
"""Seconds to wait for another process that writes before a warning."""
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
        """The store of a policy with its current weights.

        Args:
            weights: `weights_hash` of these weights.
            must_keep: raise an error if the store cannot be written, instead of a warning.

        Raises:
            ConfigError: the folder of the store cannot be written, and `must_keep` is set.
        """
        identity = model_identity(policy, weights)
        name = hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()
        folder = cache_folder("references", must_keep=must_keep)
        return cls(folder / f"{name}.logps", policy.precision.master, must_keep=must_keep)

    def append(self, key: bytes, values: NDArray[Any]) -> None:
        """Adds a record. If it cannot be written, there is one warning, and later records are not tried.

        Args:
            key: 16 bytes that identify the micro-batch.
            values: its log-probs, [scored tokens].

        Raises:
            ConfigError: it cannot be written, and `must_keep` is set.
        """
        if not self._writable:
            return
        data = values.astype(self._numpy).tobytes()
        record = _HEAD.pack(_MAGIC, key, len(data), zlib.crc32(key + data)) + data
        try:
            try:
                self._add(record)
            except FileNotFoundError:  # the cache folder may be deleted at any time, also just now
                self._add(record)
        except OSError as error:
            self._give_up(error)

    def _add(self, record: bytes) -> None:
        with self._alone(), self.path.open("ab") as file:
            self._cut_tail(file)
            file.write(record)
            self._end = file.tell()

    def clear(self) -> None:
        """Deletes all records."""
        try:
            with self._alone():
                self.path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)
        self._end = 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock, and logs if another process keeps it for long."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            log.warning("%s: waiting for another process that is writing", self.path)
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
        log.warning("%s cannot be written (%s): later runs will score the reference again", self.path, problem)

    def read(self, wanted: Set[bytes]) -> Iterator[tuple[bytes, NDArray[Any]]]:
        """Pairs of key and log-probs [scored tokens] for the wanted records that exist, the first one per key."""
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
        """Truncates the file after its last complete record, so that records added after it can be read."""
        size = os.fstat(file.fileno()).st_size
        if size == self._end:
            return
        end = 0
        if size:
            with self.path.open("rb") as old, mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ) as data:
                # Start at the known end. If no record begins there, the file has been replaced: start at its beginning.
                for start in (self._end, 0):
                    end = end or max((stop for _, _, stop in _records(data, start)), default=0)
        if end < size:
            log.warning("%s: the last %d bytes are an incomplete record and are removed", self.path, size - end)
            file.truncate(end)
            file.seek(end)


def _records(data: mmap.mmap, position: int) -> Iterator[tuple[bytes, int, int]]:
    """(key, start, stop) of the values of each record, up to the first incomplete one."""
    while position + _HEAD.size <= len(data):
        magic, key, length, checksum = _HEAD.unpack_from(data, position)
        start = position + _HEAD.size
        position = start + length
        if magic != _MAGIC or position > len(data) or zlib.crc32(key + data[start:position]) != checksum:
            return
        yield key, start, position


def model_identity(policy: Policy, weights: str) -> dict[str, object]:
    """Everything that the log-probs of a policy depend on, as far as possible to the last bit. That includes whatever
    changes the order of additions, since kernels are chosen by it."""
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
    """The properties of a CPU by which kernels are chosen."""
    return ["cpu", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), machine.processor().name]
