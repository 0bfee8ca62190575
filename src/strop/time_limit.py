"""Work that a foreign file may make endless, in a process that can be ended. Floor 1, no torch.

A template is stopped by a signal between two instructions of Python. A regular expression or a normaliser of a
tokenizer runs in another language, where no signal of Python is heard: only the system can end that, with its process.
So such work is done in another process, with a limit of processor time and memory that the system itself holds.

What is done here as well is tried there first (`tried`), on systems that can copy a process. Where none can be copied
(Windows, and macOS, whose libraries do not survive it) nothing is tried.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

CAN_FORK = sys.platform == "linux"

SECONDS = 60.0
"""Processor time of a trial. Reading a tokenizer takes one or two."""

BYTES = 4 << 30
"""Memory, above what the process had before."""

SLACK = 10
"""A process that waits uses no processor time: it gets so many times its limit on the clock."""

_WATCH = 0.5
_MEMORY = 3


class TooMuch(Exception):  # noqa: N818 (a finding, which the caller turns into an error)
    """A limit was passed; the text names it: `60 seconds of processor time`, `4 GiB of memory`."""


def tried(work: Callable[..., object], *arguments: Any, seconds: float | None = None) -> None:
    """Do it in a copy of this process, for nothing but to see that it comes to an end; its errors are not told, since
    doing it here brings them again.

    Args:
        seconds: `SECONDS`, where nothing is said.

    Raises:
        TooMuch: it takes more than `seconds`, or more than `BYTES` of memory.
    """
    if not CAN_FORK:
        return
    seconds = SECONDS if seconds is None else seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        pid = os.fork()
    if pid == 0:
        _try(work, arguments, seconds)
    until = time.monotonic() + SLACK * seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise TooMuch(limit_passed(code, seconds))


def _try(work: Callable[..., object], arguments: tuple[Any, ...], seconds: float) -> None:
    """In the copy; it never returns."""
    code = 0
    try:
        enter()
        bound_memory()
        bound_time(seconds)
        work(*arguments)
    except MemoryError:
        code = _MEMORY
    except BaseException:  # noqa: BLE001 (it comes again where it is told)
        code = 0
    finally:
        os._exit(code)


def limit_passed(code: int | None, seconds: float) -> str:
    """Which limit ended a process. code: its exit code, or minus the signal that it died of."""
    if code in (-int(getattr(signal, "SIGXCPU", 0)), -int(getattr(signal, "SIGKILL", 0))):
        return f"{seconds:g} seconds of processor time"
    return f"{BYTES >> 30} GiB of memory"


def enter(parent: int | None = None) -> None:
    """At the start of another process: no threads of tokenizers, no say in Ctrl-C, an end with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # what other languages print when they give up; what is to be told, the parent tells
    os.close(silence)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent or os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A process that is killed ends none of those it has started; they have to look."""
    if os.name == "nt":
        started_by = multiprocessing.parent_process()
        if started_by is not None:
            wait([started_by.sentinel])
            os._exit(1)
        return
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


def bound_time(seconds: float) -> None:
    """From now on this process gets so much processor time more, where the system can hold it to that."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(used + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if most < 0 else min(wanted, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def bound_memory() -> None:
    """From now on this process gets `BYTES` more, on Linux."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split(maxsplit=1)[0])
    except (ImportError, OSError):
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + BYTES
    if all(limit < 0 or limit > wanted for limit in (before, most)):
        resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
