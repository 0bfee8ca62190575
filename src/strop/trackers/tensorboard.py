"""TensorBoard: events files in the run's logs. Floor 2."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from strop.trackers.tracker import REPORT, SAMPLES, Ended, Held, RunFacts, Table, charted, markdown, samples_table

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes every number of a record as `{split}/{name}`. After a resume, what earlier files have beyond the
    checkpoint is not shown."""

    knows = False
    identity: Mapping[str, str] = {}

    def __init__(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.3 s, so only runs with this tracker import it

        folder = facts.logs / "tensorboard"
        self._held = Held(facts.logged)
        logger.info("tensorboard: %s; tensorboard --logdir shows it", folder)
        # a run that was killed before its first checkpoint logs everything again
        from_step = 0 if facts.resumed_at is None else facts.resumed_at + 1
        self._writer = SummaryWriter(folder, purge_step=from_step if facts.is_resumed else None)
        if facts.config and not facts.is_resumed:
            self._writer.add_text("config", "\n".join(_lines(facts.config)))

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in charted(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # otherwise a killed run would lose up to two minutes of records

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        if not self._held.has_samples(step):  # unlike numbers, texts of earlier files are all shown
            self._writer.add_text(SAMPLES, markdown(samples_table(lines)), step)
            self._writer.flush()

    def report(self, step: int, tables: Sequence[Table]) -> None:
        for table in tables:
            self._writer.add_text(f"{REPORT}/{table.name}", markdown(table), step)

    def close(self, ended: Ended) -> None:
        self._writer.close()


def _lines(values: Mapping[str, Any], indent: str = "    ") -> list[str]:
    """The configuration as indented text, which TensorBoard shows as it is."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
