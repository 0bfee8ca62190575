"""Whether the other processes of a training still live, and what each did last. Floor 2.

In every process, a thread writes a beat into the store of torch.distributed every `BEAT_SECONDS`, and reads the beats
of the others. If the beats of a process stop, it hangs, or it or its machine is gone; if they never begin, it died at
its start. Then every other process ends, and the first of them prints which one it was and what it last did. The time
in which this process stood still itself, as all do in a container that is paused, does not count. A process also ends
if the store does not answer, because then the launcher or the machine that holds the store is gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from strop.launch_attempt import LaunchAttempt
from strop.terminal import SECONDS_TO_SPEAK, complain

BEAT_SECONDS = 1.0
LIMIT_SECONDS = 28.0
"""After so long without a beat a process counts as hung."""
BEGIN_SECONDS = 300.0
"""After so long without a first beat a process counts as one that never began. Imports can take minutes."""
GONE_SECONDS = 3.0
"""After so long without a beat a process whose connection broke counts as gone."""
MEETING_SECONDS = 0.05
"""How often rank 0 reads the store until every process has begun: they wait for its answer."""
STARTING = "starting"
ENDING = "ending"
"""What rank 0 does when a run has failed or stopped: it writes the report and closes trackers, which may take long."""
LEFT = "left"


@dataclass
class Beat:
    """The last beat of a process. changed: when a new one was seen last, by this process's clock."""

    text: str
    changed: float

    def is_of(self, doing: str) -> bool:
        return bool(json.loads(self.text)["doing"] == doing)

    def __str__(self) -> str:
        beat = json.loads(self.text)
        return f"(pid {beat['pid']} on {beat['host']}) last did: {beat['doing']}"


def last_beat(store: Store, rank: int) -> str:
    """What a process of an attempt last did, as the end of a sentence that begins with it."""
    return str(Beat(store.get(_key(rank)).decode(), 0.0)) if store.check([_key(rank)]) else "had not begun"


def _key(rank: int) -> str:
    return f"beat/{rank}"


class Heartbeat:
    """The thread of one process.

    doing: what the process does now, in words. has_mesh: whether it makes collective calls beside those of its `World`.
    attempt: the keys that the processes write to.

    Raises:
        RuntimeError: the store cannot be reached.
    """

    def __init__(self, host: str, port: int, rank: int, size: int) -> None:
        self.doing, self.has_mesh = STARTING, False
        self._rank, self._size, self._count = rank, size, 0
        launch = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=LIMIT_SECONDS))
        self._beats: dict[int, Beat] = {}
        self._began = self._looked = time.monotonic()
        self._stopped = threading.Event()
        try:
            self.attempt = LaunchAttempt(launch, rank, BEGIN_SECONDS)
        except TimeoutError:
            self._end_without([0])
        self._store = self.attempt.store
        self._thread = threading.Thread(target=self._run, name="strop-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tells the others that this process leaves, and ends the thread."""
        self._stopped.set()
        self._thread.join(LIMIT_SECONDS)
        self.doing = LEFT
        with suppress(RuntimeError):  # nobody is there any more
            self._write()

    def gone(self) -> str:
        """Which processes are gone, as a sentence, once a connection has broken; empty where none is known to be."""
        deadline = time.monotonic() + 3 * GONE_SECONDS
        while not (found := list(self._silent(GONE_SECONDS))) and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
        return "; ".join(f"process {rank} of {self._size} is gone. It {self._beats[rank]}" for rank in found)

    def main_is_ending(self) -> bool:
        """Whether rank 0 has said so, and is another process."""
        return self._rank != 0 and 0 in self._beats and self._beats[0].is_of(ENDING)

    def _silent(self, seconds: float) -> Iterator[int]:
        """Ranks that have not beaten for so long, and did not leave."""
        now = time.monotonic()
        for rank, beat in sorted(self._beats.items()):
            if rank != self._rank and now - beat.changed > seconds and not beat.is_of(LEFT):
                yield rank

    def _absent(self) -> list[int]:
        """Ranks that have not beaten at all."""
        return [rank for rank in range(self._size) if rank not in self._beats]

    def _run(self) -> None:
        while True:
            try:
                self._write()
                self._read()
            except RuntimeError:  # also where it does not answer in time
                self._end("the store of the training does not answer: its launcher, or the first machine, is gone", [])
            if silent := list(self._silent(LIMIT_SECONDS)):
                listed = "; ".join(f"process {rank} of {self._size} hangs. It {self._beats[rank]}" for rank in silent)
                self._end(f"{listed}. Nothing was heard of it for {LIMIT_SECONDS:.0f} seconds", silent)
            if (absent := self._absent()) and time.monotonic() - self._began > BEGIN_SECONDS:
                self._end_without(absent)
            if self._stopped.wait(MEETING_SECONDS if absent and self._rank == 0 else BEAT_SECONDS):
                return

    def _write(self) -> None:
        self._count += 1
        beat = {"count": self._count, "doing": self.doing, "pid": os.getpid(), "host": socket.gethostname()}
        self._store.set(_key(self._rank), json.dumps(beat))

    def _read(self) -> None:
        now = time.monotonic()
        if (unseen := now - self._looked) > LIMIT_SECONDS / 2:  # this process stood still itself, perhaps all did
            for beat in self._beats.values():
                beat.changed += unseen
        self._looked = now
        begun = [rank for rank in range(self._size) if rank in self._beats or self._has_begun(rank)]
        texts = self._store.multi_get([_key(rank) for rank in begun])  # one request, however many they are
        for rank, text in zip(begun, map(bytes.decode, texts), strict=True):
            known = self._beats.get(rank)
            if known is None or known.text != text:
                self._beats[rank] = Beat(text, time.monotonic())

    def _has_begun(self, rank: int) -> bool:
        if self._store.check([_key(rank)]):
            return True
        if self._rank == 0:
            self.attempt.answer(rank)
        return False

    def _end_without(self, absent: list[int]) -> None:
        """Ends this process because others have not begun."""
        listed = ", ".join(map(str, absent))
        self._end(f"process {listed} of {self._size} has not begun within {BEGIN_SECONDS:.0f} seconds", absent)

    def _end(self, why: str, silent: list[int]) -> None:
        """Ends this process at once: its main thread may wait for what never comes. What is saved stays whole."""
        if self._stopped.is_set():
            return
        first = min(rank for rank in range(self._size) if rank not in silent)
        if self._rank == first:
            complain(f"{why}\n  to do:    start the same command again with --resume")
        else:
            time.sleep(SECONDS_TO_SPEAK)
        os._exit(1)
