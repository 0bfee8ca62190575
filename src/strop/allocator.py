"""How much freed memory, and how many kernels, the C libraries of this process keep. Floor 0."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that limit the kernel caches of oneDNN and of the layer between it and torch."""
KERNELS_KEPT = 256


def keep_few_kernels() -> None:
    """Lets oneDNN keep fewer kernels than its 1024, unless the environment sets a limit. Call it before any product.

    oneDNN keeps one kernel with its buffers for every shape of a product, and rows of many lengths have many shapes. A
    run of a model of 14 million weights in bfloat16 took 1.2 GiB, and half of that with this limit, at the same speed.
    The limit must hold all shapes of one pass, or every layer makes its kernels again: with a limit of 128 and prompts
    of 1,000 tokens, a step took 10 to 20 % longer.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


_MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for later allocations, unless the environment configures it.

    By default glibc gets every block of 32 MiB or more from the system anew, page by page. The gradient of a head is
    such a block in every backward pass: training all 135 million weights of a model took 15 % longer. With adapters on
    a frozen head there are few such blocks, and nothing is gained.
    """
    mallopt = None if any(name in os.environ for name in _MALLOC_SETTINGS) else _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_TOP_PAD, 2**26)


_LARGE, _KEPT_AT_THE_END, _MANY = 2**20, 2**24, 2**16
"""Bytes of a block that is not taken from the heap; bytes that may stay free at its end; blocks outside of it."""


def give_back_large_blocks() -> None:
    """Lets glibc give every block of 1 MiB or more back to the system as soon as it is freed, unless the environment
    configures it. For a quantised base: what quantising takes, and a dequantised weight in every product.

    By default glibc takes blocks of up to 32 MiB from its heap. Small ones that live on lie between them, so that the
    gaps fit nothing that comes later: of a base of 103 million weights, 60 MiB in 4 bits, the heap kept 340 MiB.
    """
    mallopt = None if any(name in os.environ for name in _MALLOC_SETTINGS) else _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, _MANY)
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _KEPT_AT_THE_END)


def _of_libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


MANY_ROWS = 100_000
"""Rows from which passes over all of them leave enough freed memory to give it back."""


def give_back_freed_memory(num_rows: int) -> None:
    """After passes over this many rows, give back to the system what is free in the middle of the heap, where the C
    library is glibc: it keeps blocks of up to 32 MiB there for what is allocated next."""
    if num_rows < MANY_ROWS:
        return
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)
