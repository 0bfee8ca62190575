"""TensorBoard: events files in the run's logs. Floor 2."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from strop.trackers.tracker import REPORT, SAMPLES, Ended, Held, RunFacts, Table, charted, markdown, samples_table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes every number of a record as `{split}/{name}`. After a resume, what earlier files have beyond the
    checkpoint is not shown."""

    knows = False
    identity: Mapping[str, str] = {}

    def __init__(self, facts: RunFacts) -> None:
        self._folder = facts.logs / "tensorboard"
        self._held = Held(facts.logged)
        self._writer: SummaryWriter | None = None
        logger.info("tensorboard: %s; tensorboard --logdir shows it", self._folder)
        # a run that was killed before its first checkpoint logs everything again
        from_step = 0 if facts.resumed_at is None else facts.resumed_at + 1
        with self._open(purge_step=from_step if facts.is_resumed else None) as writer:
            if facts.config and not facts.is_resumed:
                writer.add_text("config", "\n".join(_lines(facts.config)))

    def log(self, record: Mapping[str, Any]) -> None:
        with self._open() as writer:
            for name, value in charted(record).items():
                writer.add_scalar(name, value, record["step"])

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        if not self._held.has_samples(step):  # unlike numbers, texts of earlier files are all shown
            with self._open() as writer:
                writer.add_text(SAMPLES, markdown(samples_table(lines)), step)

    def report(self, step: int, tables: Sequence[Table]) -> None:
        with self._open() as writer:
            for table in tables:
                writer.add_text(f"{REPORT}/{table.name}", markdown(table), step)

    def close(self, ended: Ended) -> None:
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _open(self, purge_step: int | None = None) -> Iterator[SummaryWriter]:
        """The writer. What the block gives it is in its file at the end: otherwise a killed run would lose up to two
        minutes of records. A writer that has failed once fails for ever, so the next block has another one."""
        from torch.utils.tensorboard import SummaryWriter  # takes 0.3 s, so only runs with this tracker import it

        _tell_once()
        try:
            if self._writer is None:
                self._writer = SummaryWriter(self._folder, purge_step=purge_step)
            yield self._writer
            self._writer.flush()
        except Exception:
            broken, self._writer = self._writer, None
            if broken is not None:
                with suppress(Exception):
                    broken.close()
            raise


@cache
def _tell_once() -> None:
    """The thread that writes the file keeps its error, which is raised where the file is flushed. Python would print it
    on the terminal as well."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if getattr(found.thread, "exception", None) is not found.exc_value:
            before(found)

    threading.excepthook = hook


def _lines(values: Mapping[str, Any], indent: str = "    ") -> list[str]:
    """The configuration as indented text, which TensorBoard shows as it is."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
