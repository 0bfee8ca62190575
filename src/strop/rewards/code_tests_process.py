"""The process that runs code and its tests: python -I code_tests_process.py DESCRIPTOR. Floor 2, standard library only.

In, on standard input: a JSON object with code, tests, token and limits. Out, to the descriptor: the token and how many
tests passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from typing import Any

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""Flags of the system call `unshare`: a network of its own, which has nothing in it."""


def limit(job: dict[str, Any]) -> None:
    """From now on: so much time, memory and disk, and no network where the system allows that."""
    import resource  # Windows has none; the caller has looked

    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)
    seconds = int(job["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))


def main() -> None:
    job = json.load(sys.stdin)
    limit(job)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(job["code"], "completion", "exec"), space)
    passed = 0
    for test in job["tests"]:
        with contextlib.suppress(Exception):
            exec(compile(test, "test", "exec"), space)
            passed += 1
    os.write(int(sys.argv[1]), f"{job['token']}{passed}\n".encode())


if __name__ == "__main__":
    main()
