"""Several real processes on this machine, joined as torchrun joins them: `in_processes(2, work, ...)`.

They are forked from a server that has imported strop once, so that each takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

import torch
from torch.distributed import TCPStore

T = TypeVar("T")
PATIENCE_SECONDS = 120
STORES: list[TCPStore] = []
"""They live as long as their processes may."""
FORKED = multiprocessing.get_context("forkserver")
OURS = ("strop.cli.entry", "strop.training", "strop.distributed", "torch.distributed.elastic.multiprocessing")
OTHERS = ("transformers.models.llama.modeling_llama", "pandas")
"""What the first run of a process imports beside."""
FORKED.set_forkserver_preload([*OURS, *OTHERS])


def start_program(code: str, stderr: str, environment: Mapping[str, str]) -> ForkServerProcess:
    """A process that runs `code` with these environment variables. stderr: path of the file or terminal that it writes
    its standard error to; standard output is dropped."""
    process = FORKED.Process(target=_run_program, args=(code, stderr, dict(environment)))
    process.start()
    return process


def _run_program(code: str, stderr: str, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
    exec(code, {})


def apart(work: Callable[..., T], *args: Any) -> T:
    """What `work(*args)` gives in a process of its own, or the error that it raises. Needs no semaphores, as pools do,
    which stand in /dev/shm."""
    here, there = FORKED.Pipe()
    process = FORKED.Process(target=_answered, args=(there, work, args))
    process.start()
    there.close()
    try:
        result: Any = here.recv()
    finally:
        process.join()
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def in_processes(size: int, work: Callable[..., T], *args: Any) -> list[T]:
    """`work(*args)` in each process of a world of this size: what each gives, by rank. An error in one is raised here.

    work: a function of a module, which joins the world by itself, as `strop.train` does, or by `joined`.
    """
    found: list[Any] = []
    for rank, (process, here) in enumerate(start_processes(size, work, *args)):
        try:
            assert here.poll(PATIENCE_SECONDS), f"process {rank} says nothing"
            found.append(here.recv())
        except EOFError:
            found.append(AssertionError(f"process {rank} is gone"))
        finally:
            process.join(5)
            process.kill()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def start_processes(size: int, work: Callable[..., Any], *args: Any) -> list[tuple[ForkServerProcess, Connection]]:
    """The processes of a world of this size, by rank, and what each answers by: what `work(*args)` gives."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    STORES.append(store)
    started = []
    for rank in range(size):
        here, there = FORKED.Pipe()
        process = FORKED.Process(target=_run, args=(there, rank, size, store.port, work, args))
        process.start()
        there.close()
        started.append((process, here))
    return started


def _run(answer: Connection, rank: int, size: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "",  # they are compared with float32 on the CPU
    }
    _answered(answer, work, args)


def _answered(answer: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = work(*args)
    except BaseException as error:  # noqa: BLE001 (raised in the test)
        error.add_note("".join(traceback.format_exception(error)))
        result = error
    answer.send(result)
