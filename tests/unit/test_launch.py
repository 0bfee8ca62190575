"""Signals to `strop train` while its processes run: each is passed on, none ends the launcher first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from strop import launch

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
time.sleep(20)
"""
"""A process that says that it has begun, and saves when it is asked to end."""
IGNORES = """
import signal, sys, time
open(sys.argv[1], "w").close()
time.sleep(1)
sys.exit(signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[[str, signal.Signals], int]:
    """The exit code of a launch of two such programs, whose launcher gets a signal once both have begun."""
    start = launch.start_processes

    def run(program: str, number: signal.Signals) -> int:
        files = [tmp_path / "begun0", tmp_path / "begun1"]

        def started(name: str, python: str, args: Any, **parts: Any) -> Any:
            own = {rank: ("-c", program, str(files[rank])) for rank in args}
            return start(name, sys.executable, args=own, **parts)

        def send() -> None:
            while not all(file.exists() for file in files):
                threading.Event().wait(0.05)
            threading.Event().wait(0.2)  # until the launcher waits for them
            os.kill(os.getpid(), number)

        monkeypatch.setattr(launch, "start_processes", started)
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        return launch.launch([], 2)

    return run


def test_a_second_signal_while_the_first_is_passed_on(
    launched: Callable[[str, signal.Signals], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the launcher ends, and its processes with it before they have saved."""
    kill, sent = os.kill, []

    def once_more(pid: int, number: int) -> None:
        if pid != os.getpid() and not sent:
            sent.append(pid)
            signal.raise_signal(signal.SIGTERM)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", once_more)
    assert launched(PROGRAM, signal.SIGTERM) == 75 and sent


def test_what_nohup_ignores_is_ignored_by_all(launched: Callable[[str, signal.Signals], int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert launched(IGNORES, signal.SIGHUP) == 0
