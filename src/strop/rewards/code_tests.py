"""Tests run on code that a model wrote, in a process of its own with limits. Floor 2, no torch.

The system holds the limits: processor time, memory, size of files, no inherited environment, an empty folder that is
removed. On Linux the process has no network where the system lets it give that up. This stops accidents: endless loops,
full memory, files left behind. It is no prison for code that means to break out, so it is off unless asked for.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HARNESS = Path(__file__).with_name("code_tests_process.py")

CLOCK = 3.0
"""A process that waits uses no processor time: it gets so many times its limit on the clock."""


def tests_passed(code: str, tests: Sequence[str], *, seconds: float, memory_mib: int) -> int:
    """How many of the tests, pieces of code that follow it, run to their end; 0 where the code itself does not.

    Args:
        seconds: of processor time, for all tests together. memory_mib: MiB of address space.
    """
    token = secrets.token_hex(16)
    job = {"code": code, "tests": list(tests), "token": token, "seconds": seconds, "bytes": memory_mib << 20}
    ours, theirs = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="strop-tests-", ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", str(HARNESS), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
                pass_fds=[theirs],
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(job).encode(), timeout=CLOCK * seconds)
            except subprocess.TimeoutExpired:
                pass  # it is killed below, with what it started
            finally:
                _end(process)
        os.set_blocking(ours, False)
        return _passed(ours, token, len(tests))
    finally:
        os.close(ours)
        os.close(theirs)


def _passed(pipe: int, token: str, most: int) -> int:
    """What the process reported. Only a line with the token counts: the code may write there, too."""
    try:
        lines = os.read(pipe, 1 << 16).decode(errors="replace").splitlines()
    except BlockingIOError:
        return 0
    counts = [line.removeprefix(token) for line in lines if line.startswith(token)]
    return min(most, int(counts[-1])) if counts and counts[-1].strip().isdecimal() else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended
    finally:
        process.wait()
