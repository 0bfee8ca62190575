"""All trackers of a run as one: every line goes to each of them. Floor 2.

A chart is not worth losing a run: whatever a tracker raises is counted and told once. What it did not take waits and is
offered again after a while, with growing pauses, so that a server that comes back gets everything and one that does not
costs no time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from strop.errors import StropError, first_line
from strop.readable import is_number
from strop.redact import redact
from strop.trackers.tracker import REPORT, SAMPLES, Ended, Table, Tracker

logger = logging.getLogger(__name__)

FIRST_PAUSE = 15.0
LONGEST_PAUSE = 1800.0
"""Seconds between two attempts."""


class Trackers:
    """Several trackers as one.

    Args:
        start: starts each tracker, by its name.
        keep: called with the identities of the trackers that have started, by name, when one has. Where it raises a
            StropError, it is called again with the next line.
    """

    def __init__(
        self,
        start: Mapping[str, Callable[[], Tracker]],
        keep: Callable[[Mapping[str, Mapping[str, str]]], None] = lambda identities: None,
    ) -> None:
        self._outlets = {name: _Outlet(name, own) for name, own in start.items()}
        self._keep = keep
        self._kept: Mapping[str, Mapping[str, str]] = {}
        self._has_warned = False
        for outlet in self._outlets.values():
            outlet.send()
        self._write_down()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand on one line of metrics.jsonl, without what is no number."""
        for outlet in self._outlets.values():
            outlet.offer(_numbers(record))
        self._write_down()

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Hand on the lines of samples.jsonl of a step, as one table."""
        for outlet in self._outlets.values():
            outlet.offer({"step": step, "split": SAMPLES, "lines": lines})

    def report(self, step: int, tables: Sequence[Table]) -> None:
        """Hand on the tables of the report of a run that ended after this step."""
        for outlet in self._outlets.values():
            outlet.offer({"step": step, "split": REPORT, "tables": tables})

    def catch_up(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Offer the records of an earlier process again, since one that was killed may not have sent all of them. Only
        trackers that know which records they have get them."""
        knowing = [outlet for outlet in self._outlets.values() if outlet.tracker is not None and outlet.tracker.knows]
        for record in records if knowing else ():
            for outlet in knowing:
                outlet.offer(_numbers(record))

    def close(self, ended: Ended) -> None:
        for outlet in self._outlets.values():
            outlet.close(ended)
        self._outlets.clear()

    def _write_down(self) -> None:
        found = {name: o.tracker.identity for name, o in self._outlets.items() if o.tracker is not None}
        if found == self._kept:
            return
        try:
            self._keep(found)
            self._kept = found
        except StropError as error:  # a disk that is full now may have room at the next line
            if not self._has_warned:
                logger.warning("what trackers go on with after a resume could not be written yet: %s", error)
            self._has_warned = True


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name in ("step", "split") or is_number(value)}


class _Outlet:
    """A tracker, the records that wait for it, and when it is tried again."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self._start = name, start
        self.tracker: Tracker | None = None
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._failures = 0
        self._pause, self._next_try = FIRST_PAUSE, 0.0

    def offer(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(record)
        if time.monotonic() >= self._next_try:
            self.send()

    def send(self) -> None:
        """Start the tracker, if it has not started yet, and hand over all that waits, in order."""
        try:
            if self.tracker is None:
                self.tracker = self._start()
            while self._waiting:
                self._hand_over(self.tracker, self._waiting[0])
                self._waiting.popleft()
        except Exception as error:  # noqa: BLE001 (see above)
            self._failures += 1
            if self._failures == 1:
                what = "could not be started" if self.tracker is None else "took no record"
                logger.warning("%s %s: %s. The run goes on, and tries it again.", self.name, what, _why(error))
            self._next_try = time.monotonic() + self._pause
            self._pause = min(4 * self._pause, LONGEST_PAUSE)
        else:
            self._pause = FIRST_PAUSE

    @staticmethod
    def _hand_over(tracker: Tracker, record: Mapping[str, Any]) -> None:
        if record["split"] == SAMPLES:
            tracker.show(record["step"], record["lines"])
        elif record["split"] == REPORT:
            tracker.report(record["step"], record["tables"])
        else:
            tracker.log(record)

    def close(self, ended: Ended) -> None:
        if self._waiting:
            self.send()
        if self._waiting:
            lost, times = len(self._waiting), self._failures
            logger.warning("%s failed %d times; the last %d records are missing there", self.name, times, lost)
        elif self._failures:
            logger.warning("%s failed %d times, and has all records in the end", self.name, self._failures)
        if self.tracker is None:
            return
        try:
            self.tracker.close(ended)
        except Exception as error:  # noqa: BLE001 (see above)
            logger.warning("%s could not be closed; its last records may be missing: %s", self.name, _why(error))
            with suppress(Exception):
                self.tracker.close("failed")


def _why(error: Exception) -> str:
    """What an error says, without what it may quote of addresses and keys."""
    return redact(first_line(error)) or type(error).__name__
