"""What a tracker is told of the run when it starts. Floor 2."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

SPLITS = ("train", "eval")
SAMPLES = "samples"
REPORT = "report"
COLUMNS = ("prompt", "completion", "score")
"""What a table of samples shows of each line, where it has it."""
Ended = Literal["finished", "stopped", "failed"]
"""How a run ended: to its last step, by a signal, or by an error."""


class Table(NamedTuple):
    """A table with a name, as a tracker shows it: names of its columns, and rows with a cell for each."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class RunFacts:
    """A run, as trackers know it.

    name: shown in the tracker. logs: the folder for files. config: the resolved configuration, as sections of values.
    project: of the tracker, where the configuration names one. resumed_at: the step of the checkpoint that the run goes
    on from. known: what the tracker wrote down about this run at its first start, such as its id; empty at the first
    start. logged: by split, the last step that an earlier process logged.
    """

    name: str
    logs: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    project: str | None = None
    resumed_at: int | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    logged: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier process has begun this run, with a checkpoint or without."""
        return self.resumed_at is not None or bool(self.known or self.logged)


class Tracker(Protocol):
    """One tracker of one run. Its class is called with the facts of the run, and may raise whatever its package does.

    Attributes:
        knows: whether it finds out by itself what it holds of the run, and ignores records that it holds.
        identity: what to write down, so that a resumed run goes on in the same place; nothing secret.
    """

    knows: bool
    identity: Mapping[str, str]

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes one record: `step`, `split` and numbers."""

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Takes the samples of a step, which it may hold already. lines: of samples.jsonl."""

    def report(self, step: int, tables: Sequence[Table]) -> None:
        """Takes the tables of the report of a run whose last step this is; it shows them as `report/{name}`."""

    def close(self, ended: Ended) -> None:
        """Writes out what is still buffered, and says how the run ended."""


def charted(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record as `{split}/{name}`, without its step."""
    return {f"{record['split']}/{name}": value for name, value in record.items() if name not in ("step", "split")}


class Held:
    """What a tracker holds already: by split, all steps up to one."""

    def __init__(self, last: Mapping[str, int]) -> None:
        self._last = dict(last)

    def __contains__(self, record: Mapping[str, Any]) -> bool:
        return bool(record["step"] <= self._last.get(record["split"], -1))

    def has_samples(self, step: int) -> bool:
        """Whether the samples of a step are there: they are handed over before the evaluation of the same step."""
        return {"step": step, "split": "eval"} in self


def samples_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Samples as a table."""
    columns = [name for name in COLUMNS if any(name in line for line in lines)]
    return Table(SAMPLES, columns, [[line.get(name) for name in columns] for line in lines])


def markdown(table: Table) -> str:
    """A table in Markdown; what is in a cell stays text."""

    def cell(value: Any) -> str:
        text = html.escape("" if value is None else str(value), quote=False)
        return text.replace("|", "&#124;").replace("\r", "").replace("\n", "<br>").replace("`", "&#96;")

    head = [f"| {' | '.join(map(cell, table.columns))} |", f"|{'---|' * len(table.columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(cell, row))} |" for row in table.rows)])
