"""What the process keeps of memory that it has freed, each in a process of its own: it cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from strop.policy.allocator import is_out_of_memory

PROGRAM = """
import resource
import torch
from strop.policy.allocator import keep_freed_memory

keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(1, 5):
    torch.ones(2**24 - 1024 * i)  # an aligned block may need a little more than one of its size left
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 2**26 // 4096
"""Of four tensors of 64 MiB."""


def fresh_pages(**environment: str) -> int:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "THP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("unable to mmap 95705224 bytes from file <x.safetensors>: Cannot allocate memory (12)"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_blocks_are_used_again() -> None:
    assert fresh_pages() < PAGES // 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_the_environment_says_stands() -> None:
    """Blocks of this size come from the system and go back to it, as the C library has it by itself."""
    assert fresh_pages(MALLOC_MMAP_THRESHOLD_="1048576") > PAGES // 2


HELD = """
import torch
from strop.policy.allocator import give_back_large_blocks

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

CALLED
before, kept = resident(), []
for i in range(20):
    large = [torch.ones(2**21 - 4096 * i) for _ in range(4)]
    kept.append(torch.ones(2**17))
    del large
print(resident() - before)
"""
"""MiB that stay after 80 tensors of 8 MiB came and went, and 20 of half a MiB came and stayed."""


def held(*, called: bool, **environment: str) -> int:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "THP_"))}
    program = HELD.replace("CALLED", "give_back_large_blocks()" if called else "")
    done = subprocess.run(
        [sys.executable, "-c", program], env={**plain, **environment}, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_are_given_back() -> None:
    assert held(called=True) < 25
    assert held(called=False) > 30
    assert held(called=True, MALLOC_MMAP_THRESHOLD_=str(2**25)) > 30, "what the environment says stands"
