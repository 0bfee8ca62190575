"""Findings while a run goes on. Floor 2, no torch.

In: the run folder, whose configuration, data report and plan are written, and then every line of metrics.jsonl as it is
logged. Out: findings that are new. A finding about the end of a run is not looked for; one about its course waits until
there is a course: enough lines, and the warm-up is over. Checks become rarer as the run gets longer, by the number of
lines alone, so that a run stops at the same step wherever it runs.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from strop.config.stop_on import AT_ONCE, AT_THE_END
from strop.readable import is_number
from strop.report.diagnose import diagnose
from strop.report.facts import Facts
from strop.report.findings import Finding, Severity, Thresholds
from strop.report.run_record import Margins, RunRecord, Table, read_run, samples_of

EVERY_LINE = 20
"""So many lines of a split are each looked at; after that, whenever there are `GROWTH` times as many."""
GROWTH = 1.15
MOST_LINES = 4096
"""Of a split, in memory; every second line is let go where there are more."""


class Watch:
    """The findings of a run that goes on.

    Args:
        stop_on: ids whose warnings count, too.
    """

    def __init__(self, folder: Path, stop_on: Collection[str] = ()) -> None:
        self._folder, self._stop_on = folder, frozenset(stop_on)
        self._run: RunRecord | None = None
        self._splits: dict[str, _Lines] = {}
        self._told: set[str] = set()

    def line(self, line: Mapping[str, Any]) -> list[Finding]:
        """Takes a line of metrics.jsonl, which the folder may have already or not; returns findings that are new: all
        of severity `fail`, and those of `stop_on` that are at least `warn`."""
        split = str(line.get("split"))
        if split not in ("train", "eval"):
            return []
        if self._run is None:
            self._begin(line)
        lines = self._lines(split)
        loss = line.get("loss")
        due = lines.add(line) or not is_number(loss) or not math.isfinite(loss)
        return self._look() if due else []

    def _lines(self, split: str) -> _Lines:
        assert self._run is not None
        if split not in self._splits:
            self._splits[split] = _Lines(self._run.numbers)
        return self._splits[split]

    def _begin(self, line: Mapping[str, Any]) -> None:
        """With the first line: reads what the folder says of the run, and what an earlier process has logged."""
        self._run, step = read_run(self._folder), float(line.get("step", 0))
        for split, table in (("train", self._run.train), ("eval", self._run.eval)):
            until = step if split == line.get("split") else step + 0.5  # the line itself may be there already
            self._lines(split).begin_with(table, int(np.searchsorted(table.step, until)))

    def _look(self) -> list[Finding]:
        assert self._run is not None
        run = replace(
            self._run,
            train=self._lines("train").table(),
            eval=self._lines("eval").table(),
            margins=Margins((), ()),
            samples=samples_of(self._folder, []),
            failure={},
            result={},
        )
        facts = Facts(run, Thresholds())
        has_course = facts.has_trend and _is_warm(facts)
        new = [f for f in diagnose(run).findings if self._counts(f, has_course)]
        self._told |= {f.id for f in new}
        return new

    def _counts(self, finding: Finding, has_course: bool) -> bool:
        if finding.id in self._told or finding.id in AT_THE_END:
            return False
        if finding.id not in AT_ONCE and not has_course:
            return False
        wanted = finding.severity is Severity.WARN and finding.id in self._stop_on
        return wanted or finding.severity is Severity.FAIL


def _is_warm(facts: Facts) -> bool:
    """Whether the learning rate has been at half of its height, or the run does not say."""
    rates = facts.run.train.series("learning_rate")[1]
    return not len(rates) or not facts.rate or float(rates.max()) >= facts.rate / 2


class _Lines:
    """The lines of one split as columns. names: of the numbers that are kept."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._columns: dict[str, array[float]] = {}
        self._num_kept = self._num_seen = 0
        self._next = 1

    def begin_with(self, table: Table, count: int) -> None:
        """The first `count` lines of a table, thinned out where they are many."""
        every = -(-count // MOST_LINES) or 1
        columns = {"step": table.step, **table.columns}
        self._columns = {name: array("d", values[:count:every].tolist()) for name, values in columns.items()}
        self._num_kept, self._num_seen = len(range(0, count, every)), count
        self._next = count + 1

    def add(self, line: Mapping[str, Any]) -> bool:
        """Returns whether it is time to look."""
        for name in self._names:
            value = line.get(name)
            if name not in self._columns:
                if value is None:
                    continue
                self._columns[name] = array("d", [math.nan] * self._num_kept)
            self._columns[name].append(float(value) if is_number(value) else math.nan)
        self._num_kept += 1
        self._num_seen += 1
        if self._num_kept > MOST_LINES:
            self._columns = {name: values[::2] for name, values in self._columns.items()}
            self._num_kept = len(range(0, self._num_kept, 2))
        if self._num_seen < self._next:
            return False
        self._next = self._num_seen + 1 if self._num_seen < EVERY_LINE else math.ceil(self._num_seen * GROWTH)
        return True

    def table(self) -> Table:
        columns = {name: np.array(values) for name, values in self._columns.items()}
        step = columns.pop("step", np.zeros(0))
        return Table(step, {name: values for name, values in columns.items() if np.isfinite(values).any()})
