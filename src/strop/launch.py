"""Starts the processes of a training on this machine, and ends when they have. Floor 9.

torch's own launcher does the work (torch.distributed.elastic). A signal to this process is passed on, as often as it
comes, and then waited for as long as it takes: a save must not be cut off. What this process was told to ignore (nohup)
is ignored by all. One process that fails ends all.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes
from torch.distributed.elastic.multiprocessing.api import RunProcsResult

from strop.heartbeat import last_beat
from strop.launch_attempt import newest
from strop.machine import num_cores
from strop.terminal import complain

PERIOD_SECONDS = 0.2
"""How often the processes are looked at."""
HOST = "127.0.0.1"
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals by which processes are asked to end."""
PASSED_ON = tuple(name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))
"""Windows has only the first two."""
HANDLED = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""The variable that tells torch's launcher for which signals to install its handlers."""


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Runs `strop` with these arguments in this many processes.

    Returns:
        The exit code: 0 if all processes return 0, else that of the first process that failed. If a signal killed that
        process, it is 128 + the number of the signal.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # `_exit_code` says what happened
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    heard = _heard()
    with tempfile.TemporaryDirectory(prefix="strop-") as folder:
        with _handled_by_torch(heard):
            processes = start_processes(
                "strop",
                sys.executable,
                args=dict.fromkeys(range(num_processes), ("-m", "strop", *arguments)),
                envs={rank: _environment(rank, num_processes, store.port) for rank in range(num_processes)},
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
        return _exit_code(_watched(processes, heard), num_processes, store)


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets, too, and the number of threads: an equal share of the processors."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is in this process
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // size))),
    }


def _heard() -> list[signal.Signals]:
    """The signals that this process was not told to ignore."""
    numbers = [signal.Signals[name] for name in PASSED_ON]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _handled_by_torch(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """A block in which torch's launcher installs handlers for these signals only: a process that begins under a handler
    does not ignore the signal any more."""
    before = os.environ.get(HANDLED)
    os.environ[HANDLED] = ",".join(number.name for number in numbers)
    try:
        yield
    finally:
        os.environ.pop(HANDLED)
        if before is not None:
            os.environ[HANDLED] = before


def _watched(processes: PContext, heard: Sequence[signal.Signals]) -> RunProcsResult:
    """Waits until all processes have ended. Passes on these signals, here and until this process ends.

    The handlers of torch raise an error instead, and a second signal raises one wherever this process is by then.
    """
    if threading.current_thread() is threading.main_thread():  # others cannot install handlers
        for number in heard:
            signal.signal(number, lambda number, _: _pass_on(processes, number))
    found = processes.wait(period=PERIOD_SECONDS)
    assert found is not None, "it waits for ever"
    return found


def _pass_on(processes: PContext, number: int) -> None:
    for pid in processes.pids().values():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it has ended


def _exit_code(found: RunProcsResult, size: int, store: TCPStore) -> int:
    if not found.failures:
        return 0
    first = min(found.failures.values(), key=lambda failure: failure.timestamp)  # the others ended because of it
    if first.exitcode >= 0:
        return first.exitcode
    killed_by = signal.Signals(-first.exitcode)
    if killed_by not in END_SIGNALS:  # else it was asked to end before there was anything to save
        complain(
            f"process {first.local_rank} of {size} was killed by {killed_by.name}; the others were ended. "
            f"It {last_beat(newest(store), first.local_rank)}\n  to do:    start the same command again with --resume"
        )
    return 128 + killed_by
