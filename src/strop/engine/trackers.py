"""Trackers: services and files that get every line of metrics.jsonl as well. Floor 3.

A record is one line of metrics.jsonl. If a tracker fails, because of a full disk or a lost connection, a warning is
printed and it gets no more records: a chart is not worth losing a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from strop.redact import redact

logger = logging.getLogger(__name__)

FAILURES = (OSError, RuntimeError, ValueError)
"""Errors of writing and sending. Anything else is a bug and is raised."""
NOT_CHARTED = ("step", "split")


class Tracker(Protocol):
    def log(self, record: Mapping[str, Any]) -> None:
        """Takes one record: `step`, `split` and numbers."""

    def close(self) -> None:
        """Writes out what is still buffered."""


class TensorBoard:
    """Writes every number of a record as `{split}/{name}` to an events file in `folder`.

    resumed_at: the step of the checkpoint that the run continues from. Later steps in earlier files are not shown.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None, config: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 0.3 s, so only runs with this tracker import it

        self._writer = SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1)
        if config and resumed_at is None:
            self._writer.add_text("config", "".join(f"    {line}\n" for line in redact(config).splitlines()))

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name not in NOT_CHARTED:
                self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])
        self._writer.flush()  # otherwise a killed run would lose up to two minutes of records

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand on one line of metrics.jsonl, without what is no number."""
        numbers = {name: value for name, value in record.items() if name in NOT_CHARTED or _is_number(value)}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(numbers)
            except FAILURES as error:
                del self._trackers[name]
                logger.warning("%s failed and gets no more records: %s. The run goes on.", name, error)
                with suppress(*FAILURES):
                    tracker.close()

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except FAILURES as error:
                logger.warning("%s could not be closed; its last records may be missing: %s", name, error)
        self._trackers.clear()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def open_trackers(
    report_to: Sequence[str], logging_dir: Path, *, resumed_at: int | None = None, config: str = ""
) -> Trackers:
    """The trackers that `logging.report_to` names. config: the run's configuration as text, shown beside the charts."""
    opened: dict[str, Tracker] = {}
    for name in report_to:
        assert name == "tensorboard", name  # the configuration admits no other
        try:
            opened[name] = TensorBoard(logging_dir / "tensorboard", resumed_at=resumed_at, config=config)
        except FAILURES as error:
            logger.warning("%s could not be started; the run goes on without it: %s", name, error)
    return Trackers(opened)
