"""Sends the results of the loop to the run folder, the trackers and the terminal. Floor 3."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from strop.config import RunConfig
from strop.disk import remedy
from strop.durable import JsonLines
from strop.engine import checkpoint_writer
from strop.engine.ledger import ledger_line
from strop.engine.margins import MarginsLog
from strop.engine.progress import Progress
from strop.engine.recipe import recipe_of
from strop.engine.row_losses import RowLosses
from strop.engine.step_records import StepRecord
from strop.errors import CheckpointError
from strop.policy.kernels import product_rates
from strop.report.findings import Finding
from strop.report.watch import Watch
from strop.rundir import RunDir
from strop.trackers.fan_out import Trackers
from strop.world import World

log = logging.getLogger("strop")


class RunOutputs:
    """The outputs of one run, which rank 0 writes. The protocol `Outputs` of the loop describes the methods. `close`
    leaves the trackers open: they get the report, which is made of what is written here."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        trackers: Trackers,
        progress: Progress,
        world: World,
        *,
        made_from: Mapping[str, str],
        num_steps: int,
        resumed_at: int,
    ) -> None:
        self.config, self.run, self.trackers, self.progress = config, run, trackers, progress
        self.world = world
        self.made_from = made_from
        self.margins_log = MarginsLog(run.logs / "margins")
        self._row_losses = RowLosses(run.logs)
        self._metrics = _Log(run, run.metrics, self.note)
        self._ledger = _Log(run, run.ledger, self.note)
        self._samples = _Log(run, run.samples, self.note)
        self._margins_lost = self._num_tokens = 0
        self._watch: Watch | None = Watch(run.path, config.finetuning.stop_on) if world.is_main else None
        self.stopped_on: Finding | None = None
        """The finding of `finetuning.stop_on` that was raised, in the main process."""
        self.training = progress.task("training", num_steps, completed=resumed_at)

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Removes what an earlier process wrote after `step`, so that every step is recorded once.

        evaluated: whether the evaluation of `step` itself stays.
        """
        if not self.world.is_main:
            return
        self.run.rewind(step, evaluated=evaluated)
        with _as_error(self.margins_log.folder):
            self.margins_log.rewind(step)
            self._row_losses.rewind(step)
        self.trackers.catch_up(self.run.metrics.read())

    def line(self, line: Mapping[str, Any]) -> None:
        if not self.world.is_main:
            return
        self._metrics.write(line)
        found = self._look_for_findings(line)
        self.trackers.log({**line, **{f"findings/{finding.id}": 1 for finding in found}})
        self.training.record(line)
        for finding in found:
            self._tell(finding, line["step"])

    def _look_for_findings(self, line: Mapping[str, Any]) -> list[Finding]:
        """An error in a check is no reason to stop a run: it is told once, and nothing is looked for any more."""
        if self._watch is None:
            return []
        try:
            return self._watch.line(line)
        except Exception as error:  # noqa: BLE001 (see above)
            self._watch = None
            lost = "; finetuning.stop_on stops nothing any more" if self.config.finetuning.stop_on else ""
            self.note(f"warning: findings are not looked for any more: {type(error).__name__}: {error}{lost}")
            return []

    def _tell(self, finding: Finding, step: int) -> None:
        """A finding that was raised while the run goes on."""
        self.note(f"{finding.severity}: step {step}: {finding.claim} ({finding.id}; strop report {self.run.path})")
        if finding.id in self.config.finetuning.stop_on and self.stopped_on is None:
            self.stopped_on = finding

    def row_losses(self, step: int, losses: NDArray[np.float64]) -> None:
        try:
            self._row_losses.write(step, losses)
        except OSError as error:
            why = error.strerror or str(error)
            self.note(f"warning: {self._row_losses.folder}: the rows' losses of step {step} cannot be written: {why}")

    def step(self, record: StepRecord) -> None:
        if not self.world.is_main:
            return
        if record.margins is not None and self.config.logging.margins:
            self._write_margins(record, record.margins)
        self._ledger.write(ledger_line(record))
        self._num_tokens += record.num_tokens
        shown = {"loss": record.loss, "epoch": record.epochs, "tokens": self._num_tokens}
        if "rewards/margins" in record.metrics:
            total, count = record.metrics["rewards/margins"]
            shown["rewards/margins"] = total / count
        self.training.step(shown)

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """The answers after a step, as lines of samples.jsonl; called in rank 0."""
        for line in lines:
            self._samples.write(line)
        self.trackers.show(step, lines)

    def _write_margins(self, record: StepRecord, margins: NDArray[np.float64]) -> None:
        try:
            self.margins_log.write(record.epoch, record.step_in_epoch, record.step, margins)
        except OSError as error:
            self._margins_lost += 1
            if self._margins_lost == 1:
                self.note(
                    f"warning: {self.margins_log.folder}: the margins of step {record.step} cannot be written: "
                    f"{error.strerror or error}; the run goes on"
                )

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], protect: Sequence[int], world: World
    ) -> Path:
        """Saves together with the other processes.

        Args:
            world: by which they agree; that of the run, or one beside it if this is called in a thread.

        Raises:
            SaveError: in all processes, where the disk does not take it.
        """
        return checkpoint_writer.save(
            self.run.path,
            step,
            tensors,
            {**state, "recipe": recipe_of(self.config), "products": product_rates.record()},
            keep=self.config.training.save_total_limit,
            protect=protect,
            identity=self.made_from,
            world=world,
        )

    @contextmanager
    def evaluating(self, num_groups: int) -> Iterator[Callable[[int], None]]:
        task = self.progress.task("evaluation", num_groups)
        try:
            yield lambda n: task.step(n=n)
        finally:
            task.close()

    def note(self, text: str) -> None:
        if self.world.is_main and self.config.logging.log_level != "error":
            self.progress.note(text)

    def close(self) -> None:
        self.training.close()
        self._metrics.close()
        self._ledger.close()
        self._samples.close()
        if self._margins_lost:
            log.warning("%s: the margins of %d steps are missing", self.margins_log.folder, self._margins_lost)
        self.margins_log.close()


class _Log:
    """A log of the run. Lines that the disk does not take wait, and are tried again with the next line."""

    def __init__(self, run: RunDir, lines: JsonLines, note: Callable[[str], None]) -> None:
        self._run, self._lines, self._note = run, lines, note
        self._waiting: deque[Mapping[str, Any]] = deque()

    def write(self, line: Mapping[str, Any]) -> None:
        self._waiting.append(line)
        try:
            self._write_waiting()
        except CheckpointError as error:
            if len(self._waiting) == 1:  # the first of them
                self._note(f"warning: a line of {self._lines.path.name} could not be written yet: {error}")

    def _write_waiting(self) -> None:
        while self._waiting:
            self._run.append(self._lines, self._waiting[0])
            self._waiting.popleft()

    def close(self) -> None:
        """Tries once more, and says how many lines are lost."""
        with suppress(CheckpointError):
            self._write_waiting()
        if self._waiting:
            log.warning("%s: the last %d lines could not be written", self._lines.path, len(self._waiting))
        self._lines.close()


@contextmanager
def _as_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise CheckpointError(
            f"the margins cannot be written: {why}",
            where=str(folder),
            fix=f"{remedy(why)} and go on with --resume; `logging.margins: false` leaves them out",
        ) from error
