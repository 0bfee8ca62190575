"""Calls of rewards, in a process that can be ended. Floor 2, no torch.

In: the completions of one prompt. Out: the values of every reward, or what went wrong. A process that takes too long or
dies is replaced by a new one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from strop.errors import ConfigError
from strop.rewards.lookup import MODEL_PREFIX

START_SECONDS = 120.0
"""What importing the modules of the rewards may take."""

END_SECONDS = 5.0
"""What a process may take to end by itself once its pipe is closed, so that its exit code is its own."""

LOOK = 0.1
"""Seconds between two looks at the memory of the process."""


Reward = tuple[str, Mapping[str, Any]]
"""Name and settings."""


def check_rewards(rewards: Sequence[Reward], columns: Sequence[str], timeout: float) -> None:
    """Refuses rewards that cannot be called with rows of these columns, whatever the completions.

    Raises:
        ConfigError: as `RewardCaller`.
    """
    called = []
    for name, settings in rewards:
        if not name.startswith(MODEL_PREFIX):
            called.append((name, settings))
        elif settings:
            given = ", ".join(sorted(settings))
            raise ConfigError(f"a reward model has no settings, and {given} is given", where=f"rewards: {name}")
    if called:
        RewardCaller(called, timeout, to_check=columns).close()


@dataclass(frozen=True, slots=True)
class RewardCall:
    """What one reward gave for the completions of one prompt. values: one per completion, None where it gave no finite
    number. error: why there are none at all, else empty."""

    values: tuple[float | None, ...]
    error: str = ""


class RewardCaller:
    """Calls rewards in a process of their own, with this process's paths and working folder.

    Args:
        rewards: (name, settings) of each. timeout: seconds that one call may take. memory: bytes that the process may
            use (its resident memory, looked at every `LOOK` seconds of a call), where the system tells it (Linux).
        to_check: the columns that all rows have, to refuse at once what cannot be called with them. None: no such look.

    Raises:
        ConfigError: a reward cannot be found or imported, or it cannot be called with these columns and its settings;
            or this system is not one that can do it.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        timeout: float,
        memory: int | None = None,
        *,
        to_check: Sequence[str] | None = None,
    ) -> None:
        if os.name != "posix":
            raise ConfigError("rewards are called in a process of their own, which needs Linux or macOS")
        self._rewards, self._timeout = [(name, dict(settings)) for name, settings in rewards], timeout
        self._memory, self._to_check = memory, to_check
        self._process, self._pipe = self._start()

    def values(
        self, number: int, given: Mapping[str, Any], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> RewardCall:
        """One reward, for the completions of one prompt. given: arguments by name, `completions` among them. columns:
        those of the rows, by name, one value per completion.

        Raises:
            ConfigError: the reward does not fit the rows, whatever the completions.
        """
        num = len(given["completions"])
        try:
            self._pipe.send((number, dict(given), dict(columns or {})))
            if why := self._waited():
                self._restart()
                return RewardCall((None,) * num, why)
            kind, answer = self._pipe.recv()
        except (EOFError, OSError):
            return RewardCall((None,) * num, self._replace())
        if kind == "refused":
            raise answer
        if kind == "error":
            return RewardCall((None,) * num, answer)
        return RewardCall(tuple(answer))

    def _waited(self) -> str:
        """Waits for an answer. Returns why there will be none: a limit that was passed; else an empty text."""
        until = time.monotonic() + self._timeout
        while not self._pipe.poll(min(LOOK, max(0.0, until - time.monotonic()))):
            if self._memory is not None and _resident(self._process.pid) > self._memory:
                return f"its process used more than {self._memory / 2**30:.3g} GiB of memory"
            if time.monotonic() >= until:
                return f"it took more than {self._timeout:g} seconds"
        return ""

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._finalizer()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join([path for path in sys.path if path] + [os.getcwd()])
        process = subprocess.Popen(
            [sys.executable, "-m", "strop.rewards.worker", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        pipe = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _kill, process)
        where = f"rewards ({', '.join(name for name, _ in self._rewards)})"
        late = ConfigError("importing them takes too long", where=where)
        try:
            pipe.send((self._rewards, self._to_check))
            kind, answer = pipe.recv() if pipe.poll(START_SECONDS) else ("refused", late)
        except (EOFError, OSError):
            code = process.wait()
            kind, answer = "refused", ConfigError(f"their process ended as it began (exit code {code})", where=where)
        if kind == "refused":
            _kill(process)
            raise answer
        return process, pipe

    def _replace(self) -> str:
        """A new process in place of one that has closed its pipe; how that one ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        code = self._process.returncode
        self._restart()
        return "its process closed its connection to strop" if code is None else f"its process ended (exit code {code})"

    def _restart(self) -> None:
        """A new process in place of this one."""
        self.close()
        self._process, self._pipe = self._start()


def _resident(pid: int) -> int:
    """Bytes of memory that a process uses; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
