"""What the process keeps of memory that it has freed, each in a process of its own: it cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from strop.policy.memory_attempts import is_out_of_memory

PROGRAM = """
import os, resource, sys
import torch
from strop.allocator import give_back_large_blocks, keep_freed_memory

def resident():
    "MiB without files: how much of a library comes in with its first pages depends on the machine."
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024

def fresh_pages():
    "Of four tensors of 64 MiB, after one of that size came and went."
    keep_freed_memory()
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(1, 5):
        torch.ones(2**24 - 1024 * i)  # an aligned block may need a little more than one of its size left
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held(called):
    "MiB that stay after 80 tensors of 8 MiB came and went, and 20 of half a MiB came and stayed."
    if called:
        give_back_large_blocks()
    before, kept = resident(), []
    for i in range(20):
        large = [torch.ones(2**21 - 4096 * i) for _ in range(4)]
        kept.append(torch.ones(2**17))
        del large
    return resident() - before

for expression in sys.argv[1:]:
    if not (child := os.fork()):
        print(eval(expression), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
PAGES = 4 * 2**26 // 4096
"""Of four tensors of 64 MiB."""


def in_copies(*expressions: str, **environment: str) -> list[int]:
    """What these are, each in a copy of one new process, which has imported the program and done nothing."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "THP_"))}
    command = [sys.executable, "-c", PROGRAM, *expressions]
    done = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def pages_and_held() -> list[int]:
    """Fresh pages; what is held where large blocks are given back, and where they are not."""
    return in_copies("fresh_pages()", "held(True)", "held(False)")


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


@pytest.mark.nightly
@glibc
def test_freed_blocks_are_used_again(pages_and_held: list[int]) -> None:
    assert pages_and_held[0] < PAGES // 10


@pytest.mark.nightly
@glibc
def test_large_blocks_are_given_back(pages_and_held: list[int]) -> None:
    _, called, not_called = pages_and_held
    assert called < 25 and not_called > 30


@pytest.mark.nightly
@glibc
def test_what_the_environment_says_stands() -> None:
    """Blocks of this size come from the system and go back to it, as the C library has it by itself; or they do not."""
    assert in_copies("fresh_pages()", MALLOC_MMAP_THRESHOLD_="1048576")[0] > PAGES // 2
    assert in_copies("held(True)", MALLOC_MMAP_THRESHOLD_=str(2**25))[0] > 30
