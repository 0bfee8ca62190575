"""Weights & Biases, online or offline. Floor 2.

A record is one row of the run's history. W&B numbers rows by its own `_step`, which must grow; strop's is a function of
the record's step and split, so that a row has the same number whichever process logs it. Charts use `step`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from strop.errors import first_line
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
    samples_table,
)

logger = logging.getLogger(__name__)

START_SECONDS = 30.0
"""How long a server may take to answer at the start, before the run is kept offline."""
FINISH_SECONDS = 120.0
"""How long the rest may be uploaded at the end of a run."""
READ_SECONDS = 120.0
"""How long reading the files of an offline run may take."""
ROWS_PER_STEP = 5
"""Numbers of rows per step: a training line, samples, an evaluation, a training line that follows the evaluation, the
report of a run that ends there."""
SAMPLES_ROW, REPORT_ROW = 1, 4


class WeightsAndBiases:
    """A run of W&B with an id of its own. Where there is no login, or no server answers, it is kept offline, in the
    logs; `wandb sync` uploads it later.

    Nothing is collected but what is logged, system metrics and versions: no command line, no code, no repository.
    """

    knows = True

    def __init__(self, facts: RunFacts) -> None:
        import wandb

        id_ = facts.known.get("id") or uuid.uuid4().hex[:8]
        self.identity: Mapping[str, str] = {"id": id_}
        self._run, offline = _start(wandb, facts, id_)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # what a server holds, it says itself; otherwise the files say it that are to be uploaded
        self._held = Held(_in_files(facts, id_) if offline else {})
        self._next_row = 0 if offline else int(self._run.step)
        self._table = wandb.Table
        self._last: tuple[int, str] | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        step, split = record["step"], record["split"]
        place = 2 if split == "eval" else 3 if self._last == (step, "eval") else 0
        row = ROWS_PER_STEP * step + place
        if record not in self._held and row >= self._next_row:
            self._run.log({"step": step, **charted(record)}, step=row, commit=True)
            self._next_row = row + 1
        self._last = (step, split)

    def show(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        if not self._held.has_samples(step):
            self._tables(step, SAMPLES_ROW, {SAMPLES: samples_table(lines)})

    def report(self, step: int, tables: Sequence[Table]) -> None:
        self._tables(step, REPORT_ROW, {f"{REPORT}/{table.name}": table for table in tables})

    def _tables(self, step: int, place: int, tables: Mapping[str, Table]) -> None:
        """One row of tables, unless rows after it are there already."""
        row = ROWS_PER_STEP * step + place
        if row < self._next_row:
            return
        shown = {
            name: self._table(columns=list(own.columns), data=[list(cells) for cells in own.rows])
            for name, own in tables.items()
        }
        self._run.log({"step": step, **shown}, step=row, commit=True)
        self._next_row = row + 1

    def close(self, ended: Ended) -> None:
        folder = self._run.dir
        try:
            self._run.finish(exit_code=0 if ended == "finished" else 1)
        except TimeoutError as error:
            raise TimeoutError(f"not everything is uploaded yet; wandb sync {os.path.dirname(folder)} does") from error


def _start(wandb: Any, facts: RunFacts, id_: str) -> tuple[Any, bool]:
    """The run, and whether it is offline."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not wandb.login(prompt=False):
        logger.warning("wandb: there is no login (wandb login, or WANDB_API_KEY), so the run is kept offline")
        mode = "offline"
    if mode == "online":
        try:
            run = _init(wandb, facts, id_, mode)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with the server, the run is kept)
            logger.warning("wandb: %s; the run is kept offline", redact(first_line(error)))
            mode = "offline"
        else:
            logger.info("wandb: %s", run.url)
            return run, False
    run = _init(wandb, facts, id_, mode)
    if mode == "offline":
        logger.info("wandb: offline in %s; wandb sync uploads it", os.path.dirname(run.dir))
    return run, True


def _in_files(facts: RunFacts, id_: str) -> Mapping[str, int]:
    """By split, the last step in the offline files of the run, as W&B's own reader prints them. A process that is
    killed leaves less there than it logged."""
    last: dict[str, int] = {}
    for file in facts.logs.glob(f"wandb/offline-run-*-{id_}/run-{id_}.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=READ_SECONDS)
        if said.returncode:
            logger.warning("wandb: %s cannot be read; what it may hold is not logged again", file)
            return facts.logged
        records = map(json.loads, (line for line in said.stdout.splitlines() if line.startswith("{")))
        for row in (record["history"]["item"] for record in records if record.get("type") == "history"):
            for split in SPLITS:
                if f"{split}/epoch" in row:  # every line has one
                    last[split] = max(row["step"], last.get(split, -1))
    return last


def _init(wandb: Any, facts: RunFacts, id_: str, mode: str) -> Any:
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        init_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    return wandb.init(
        project=facts.project or os.environ.get("WANDB_PROJECT") or "strop",
        id=id_,
        name=facts.name,
        dir=str(facts.logs),
        config=dict(facts.config),
        mode=mode,
        resume="allow",
        reinit="create_new",
        settings=settings,
    )
