"""What all attacks share: how many there are, copies of this process that are killed, damage, and mutation.

Attacks are drawn by seed. A few of each kind run in the normal suite, as many as `few_or` is told in `make nightly`,
and as many as one likes with STROP_ATTACKS=N. At its end pytest prints how many there were, by outcome.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from strop.errors import StropError

TRAINED = {"training.save_steps": 1, "training.save_total_limit": 2, "training.reference_store": True}
"""A run that writes whatever runs write."""

LONGEST = 120.0
"""Seconds of a `Clock` after which a trial counts as a hang."""

CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"})
"""Events of Python's audit hooks that change a folder; opening a file to write is one more."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**7, 10**18, 10**400, 0.5, 1e300, "", "x", "../x", "[" * 50, [], [0], [[[]]], {},
    "{{ 9 ** (9 ** 9) }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "(a+)+$",
    "\ud800", "\0",
)  # fmt: skip


def few_or(many: int, few: int = 2) -> Any:
    """The number of trials as a parameter: `few` in the normal suite, `many` in the nightly one."""
    few = int(os.environ.get("STROP_ATTACKS", few))
    return pytest.mark.parametrize("num", [few, pytest.param(many, marks=pytest.mark.nightly)])


class Clock:
    """Seconds since it was made, less those in which the process was ready and others had the processor: a machine may
    be as busy as it likes, and that is no hang."""

    def __init__(self, process: int | None = None) -> None:
        """process: its id; None: this one. Where the system does not tell, all seconds count."""
        self._file = Path(f"/proc/{process or 'self'}/schedstat")
        self._started = self._now()

    @property
    def seconds(self) -> float:
        return self._now() - self._started

    def _now(self) -> float:
        try:
            waited = int(self._file.read_text().split()[1])
        except (OSError, IndexError):
            waited = 0
        return time.monotonic() - waited / 1e9


def outcome(work: Callable[[], Any]) -> str:
    """What became of it; whatever is no error of strop's comes through."""
    clock = Clock()
    try:
        work()
    except StropError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return type(error).__name__
    finally:
        assert clock.seconds < LONGEST
    return "done"


class Tally:
    """Counts what became of the trials of one kind, and says it as the property that pytest prints."""

    def __init__(self, kind: str, record_property: Callable[[str, object], None]) -> None:
        self._kind, self._record = kind, record_property
        self.seen: Counter[str] = Counter()
        self._started = time.monotonic()

    def add(self, what: str) -> None:
        self.seen[what] += 1

    def tell(self, num: int, **more: object) -> None:
        """num: trials, with seeds 0 to num - 1."""
        assert sum(self.seen.values()) == num
        found = ", ".join(f"{what} {count}" for what, count in sorted(self.seen.items()))
        rest = "".join(f"; {value} {name.replace('_', ' ')}" for name, value in more.items())
        took = time.monotonic() - self._started
        self._record("attack", f"{self._kind}: {num} (seeds 0 to {num - 1}): {found}{rest}; {took:.0f} s")


# ---- copies of this process

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed on POSIX alone")


def num_changes(work: Callable[[], Any]) -> int:
    """How many changes to files the work makes, in a copy of this process."""
    ours, theirs = os.pipe()

    def counted() -> None:
        count = watch_changes(None)
        work()
        os.write(theirs, str(count()).encode())

    assert run_apart(counted) == 0
    os.close(theirs)
    with os.fdopen(ours) as file:
        return int(file.read())


def fork() -> int:
    """As `os.fork`, where this process can be copied."""
    if torch.get_num_threads() > 1:
        pytest.skip("a copy of a process that has computed with several threads waits for them in OpenMP")
    return os.fork()


def run_apart(work: Callable[[], Any], *, at_change: int | None = None, after: float | None = None) -> int:
    """The exit code of a copy of this process that does the work: 0, 1 for an error of strop's, -9 where it was killed.

    Args:
        at_change: kill it as it makes its change to files of this number, from 1. A write is two: before it, and when
            half of it is done.
        after: kill it after so many seconds.
    """
    told, tells = os.pipe()
    child = fork()
    if child == 0:
        _be_child(work, tells, at_change)
    os.close(tells)
    clock, until = Clock(child), time.monotonic() + (LONGEST if after is None else after)
    done = 0
    while not done and (time.monotonic() < until or (after is None and clock.seconds < LONGEST)):
        time.sleep(0.002)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert after is not None, "the copy hangs"
    code = os.waitstatus_to_exitcode(status)
    with os.fdopen(told, errors="replace") as file:  # copies of the copy may hold the other end a while
        assert code in (0, 1, -signal.SIGKILL), (code, os.read(file.fileno(), 100_000).decode(errors="replace"))
    return code


def _be_child(work: Callable[[], Any], tells: int, at_change: int | None) -> NoReturn:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if at_change is not None:
            watch_changes(at_change)
        work()
        code = 0
    except StropError:
        code = 1
    except BaseException:  # noqa: BLE001 (it is told, and fails the test)
        os.write(tells, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def watch_changes(at_change: int | None) -> Callable[[], int]:
    """From now on this process counts its changes to files, and dies in that of number `at_change`."""
    count, me, write = 0, os.getpid(), os.write

    def changes() -> None:
        nonlocal count
        if os.getpid() == me:
            count += 1
            if count == at_change:
                os.kill(me, signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
            changes()

    def torn(fd: int, data: Any, /) -> int:
        if os.get_inheritable(fd) or not _is_file(fd):
            return write(fd, data)
        changes()
        half = len(data) // 2
        written = write(fd, data[:half]) if half else 0
        changes()
        return written + write(fd, data[written:]) if written == half else written

    sys.addaudithook(watch)
    os.write = torn  # type: ignore[assignment]
    return lambda: count


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _is_file(fd: int) -> bool:
    return os.path.isfile(f"/proc/self/fd/{fd}") if sys.platform == "linux" else True


# ---- damage and mutation


def damage(file: Path, rng: random.Random) -> str:
    """Does something to the bytes of a file; says what."""
    content = bytearray(file.read_bytes())
    how = rng.choice(("flip", "cut", "empty", "delete", "extend", "noise")) if content else "delete"
    match how:
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut":
            del content[rng.randrange(len(content)) :]
        case "empty":
            content.clear()
        case "extend":
            content += rng.randbytes(rng.randrange(1, 100))
        case "noise":
            at = rng.randrange(len(content))
            content[at : at + 16] = rng.randbytes(16)
        case _:
            file.unlink()
            return how
    file.write_bytes(content)
    return how


def mutate(value: Any, rng: random.Random) -> None:
    """Another value somewhere inside, or one thing less."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = rng.choice(VALUES)
        return


def mutate_parts(parts: Sequence[str], others: Sequence[str], rng: random.Random) -> list[str]:
    """The parts with some of them gone, twice or elsewhere, or with another one in between."""
    changed = list(parts)
    start = rng.randrange(len(changed))
    some = changed[start : start + rng.choice((1, 1, 2, 5))]
    place = rng.randrange(len(changed) + 1)
    match rng.choice(("drop", "double", "copy", "insert", "insert", "insert")):
        case "drop":
            del changed[start : start + len(some)]
        case "double":
            changed[start:start] = some
        case "copy":
            changed[place:place] = some
        case _:
            changed.insert(place, rng.choice(others))
    return changed
