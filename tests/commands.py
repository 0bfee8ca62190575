"""`strop` commands in processes of their own, forked from the server of `processes.py`, which has imported everything:
the same command, signals and exit codes in a tenth of the time that a new Python takes to import torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import start_processes

from processes import FORKED
from strop import cli, launch


class Command:
    """One command that runs; the methods are those of `subprocess.Popen` that tests use.

    Args:
        line: what stands after `strop` on the command line.
        said: the file that its standard error goes to; standard output is dropped.
        environment: its environment variables; None: those of this process.
    """

    def __init__(self, line: Sequence[str], said: Path, environment: Mapping[str, str] | None = None) -> None:
        self._said = said
        variables = dict(os.environ if environment is None else environment)
        self._process = FORKED.Process(target=_run, args=(list(line), str(said), variables, os.getcwd()))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Below 0: the signal that killed it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        code = self.returncode
        if code is None:
            self.kill()
            raise TimeoutError(f"{timeout} s were not enough: {self.said}")
        return code

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def communicate(self, timeout: float = 120) -> tuple[None, str]:
        self.wait(timeout)
        return None, self.said

    def ranks(self) -> dict[int, int]:
        """Rank -> process, of those that it has started to train together."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return dict(enumerate(sorted(map(int, children))))


def _run(line: list[str], said: str, variables: Mapping[str, str], folder: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if _has_semaphores():
        launch.start_processes = _forked  # type: ignore[assignment]
    _main(*line)


def _has_semaphores() -> bool:
    """Processes that run a function are waited for by a semaphore, which lies in /dev/shm. Where there is none, they
    are started as people's are, which takes longer."""
    try:
        multiprocessing.Semaphore()
    except OSError:
        return False
    return True


def _forked(name: str, python: str, args: Mapping[int, Sequence[str]], **parts: Any) -> Any:
    """As `start_processes`, which `launch` calls with the command `python -m strop ...` of each process."""
    assert python == sys.executable and all(arguments[:2] == ("-m", "strop") for arguments in args.values())
    own = {rank: tuple(arguments[2:]) for rank, arguments in args.items()}
    return start_processes(name, _main, args=own, start_method="fork", **parts)


def _main(*line: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
    code = cli.main(list(line))
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)
