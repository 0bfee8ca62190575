"""Trackio: its own database file, or the Space that TRACKIO_SPACE_ID names. Floor 2."""

from __future__ import annotations

import io
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from strop.redact import redact
from strop.trackers.tracker import (
    REPORT,
    SAMPLES,
    SPLITS,
    Ended,
    Held,
    RunFacts,
    Table,
    charted,
    markdown,
    samples_table,
)

logger = logging.getLogger(__name__)


class Trackio:
    """A run of Trackio. It goes by its name, so a part of that is drawn at random: two runs never share one."""

    knows = True

    def __init__(self, facts: RunFacts) -> None:
        with _quietly():
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
            from trackio.utils import TRACKIO_DIR

            name = facts.known.get("name") or f"{facts.name}-{uuid.uuid4().hex[:8]}"
            project = facts.project or "strop"
            self._run = trackio.init(project, name=name, config=dict(facts.config), resume="allow", embed=False)
            local = not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys()
            held = _last_steps(SQLiteStorage.get_logs(project, name, run_id=self._run.id)) if local else facts.logged
        there = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or str(TRACKIO_DIR)
        logger.info("trackio: %s; trackio show --project %s shows it", redact(there), project)
        self._finish, self._markdown = trackio.finish, trackio.Markdown
        self.identity: Mapping[str, str] = {"project": project, "name": name}
        self._held = Held(held)

    def log(self, record: Mapping[str, Any]) -> None:
        if record not in self._held:
            self._run.log(charted(record), step=record["step"])

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        if not self._held.has_samples(step):
            self._run.log({SAMPLES: self._markdown(markdown(samples_table(lines)))}, step=step)

    def report(self, step: int, tables: Sequence[Table]) -> None:
        self._run.log({f"{REPORT}/{table.name}": self._markdown(markdown(table)) for table in tables}, step=step)

    def close(self, ended: Ended) -> None:
        with _quietly():
            self._finish()


def _last_steps(logs: list[dict[str, Any]]) -> dict[str, int]:
    """By split, the last step in a run's logs: every line has an `epoch`."""
    found = {split: [int(line["step"]) for line in logs if f"{split}/epoch" in line] for split in SPLITS}
    return {split: max(steps) for split, steps in found.items() if steps}


@contextmanager
def _quietly() -> Iterator[None]:
    """What Trackio prints goes to the log: standard output is for what a command answers."""
    with redirect_stdout(io.StringIO()) as said:
        try:
            yield
        finally:
            for line in said.getvalue().splitlines():
                logger.debug("trackio: %s", line)
