"""What a run leaves for its report: its plan before the first step, its pairs and the page at the end. Floor 7.

plan.json   what was planned and predicted, and sizes that findings need
pairs.json  the pairs that are won the least and the most, as text, for methods that have margins
report.html, findings.json  see `strop.report`
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strop.errors import StropError
from strop.estimate import estimate
from strop.log_arrays import read_floats
from strop.readable import plain
from strop.report.diagnose import Diagnosis
from strop.report.findings import Severity
from strop.report.tables import summary
from strop.report.write import examine, write
from strop.rundir import RunDir
from strop.runfiles import PAIRS, PLAN, margins_array
from strop.session import Session
from strop.trackers.fan_out import Trackers
from strop.trackers.tracker import Table
from strop.types import Group

log = logging.getLogger("strop")

NUM_PAIRS = 10
"""Of the worst and of the best."""
MOST_STEPS = 4000
"""How many steps at the end of the run may have their margins read."""
MOST_CHARACTERS = 2000
"""Of each text of a pair."""
MOST_LOGGED = 3
"""Findings that the log names; the page has all."""


def write_plan(session: Session, run: RunDir) -> None:
    """plan.json, once the policy is built."""
    prepared, policy = session.as_built.prepared, session.policy
    plan, trained = prepared.plan, policy.trainable().values()
    run.write_json(
        PLAN,
        {
            "num_steps": plan.num_steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "groups_per_step": plan.groups_per_step,
            "vocabulary": getattr(policy.loaded_config.get_text_config(), "vocab_size", None),
            "num_trained_weights": sum(p.numel() for p in trained),
            "prediction": _prediction(session),
            **({} if policy.teacher is None else {"teacher_is_student": session.teacher_is_student}),
        },
    )


def _prediction(session: Session) -> Mapping[str, Any]:
    """What the estimate says; nothing where it knows no such architecture."""
    settled = session.as_built
    try:
        found = estimate(settled.prepared, settled.machine, settled.precision, settled.tokens)
    except StropError as error:
        return {"why_not": error.found}
    seconds = None if found.steps is None else float(found.steps.mean()) * found.num_steps
    return {"peak_memory_bytes": found.peak, "seconds": seconds, "source": found.source}


def write_pairs(session: Session, run: RunDir) -> None:
    """pairs.json: the pairs of the last epoch, or of its last steps, by the margins that were logged. Pairs that were
    sampled are in rollouts.jsonl."""
    if session.config.rollout.enabled:
        return
    margins = dict(_last_margins(session, run))
    if not margins:
        return
    order = sorted(margins, key=lambda index: (margins[index][0], index))
    count = min(NUM_PAIRS, len(order) // 2)
    groups = session.prepared.data.train
    listed = {
        name: [{"margin": margins[i][0], "step": margins[i][1], **_texts(groups[i], session)} for i in some]
        for name, some in (("worst", order[:count]), ("best", order[::-1][:count]))
    }
    note = (
        f"Of {len(margins):,} training pairs, by their margin (chosen minus rejected, not times beta) when they were "
        "last trained on. A pair that stays far below the others is often labelled the wrong way round."
    )
    run.write_json(PAIRS, {"note": note, **listed})


def _last_margins(session: Session, run: RunDir) -> Iterator[tuple[int, tuple[float, int]]]:
    """(number of the group, (its margin, the step)) of as many of the last steps as an epoch has; later steps come
    later. A run may have ended before its plan did: its last step is that of the last line of metrics.jsonl."""
    plan = session.prepared.plan
    logged = max((line["step"] for line in run.metrics.read() if isinstance(line.get("step"), int)), default=0)
    last = min(plan.num_steps, logged)
    first = max(1, last - min(plan.steps_per_epoch, MOST_STEPS) + 1)
    for step in range(first, last + 1):
        epoch, inside = plan.position(step)
        values, indices = read_floats(run.logs / "margins" / margins_array(epoch, inside)), plan.groups(step)
        if values is not None and len(values) == len(indices):
            yield from ((i, (float(v), step)) for i, v in zip(indices, values, strict=True) if np.isfinite(v))


def _texts(group: Group, session: Session) -> dict[str, Any]:
    """A pair as the text that its tokens stand for, and where it came from."""
    decode = session.prepared.tokenizer.decode
    chosen, rejected = group.completions
    parts = {"prompt": group.prompt_ids, "chosen": chosen.ids, "rejected": rejected.ids}
    texts = {name: str(decode(list(ids), skip_special_tokens=False)) for name, ids in parts.items()}
    cut = {name: text[:MOST_CHARACTERS] for name, text in texts.items()}
    return {**cut, **{f"{name}_characters": len(text) for name, text in texts.items()}, "source": str(group.origin)}


def report(session: Session, run: RunDir, trackers: Trackers) -> None:
    """Writes the page of a run that has ended, logs what it says in short, and hands its tables to the trackers. An
    error here is logged and goes no further: no training fails because of its report."""
    if not session.world.is_main:
        return
    try:
        write_pairs(session, run)
        (examined,) = examine([run.path])
        page, _ = write([examined], run.path, "training.output_dir")
        tables = [Table(table.title.lower(), table.header, table.rows) for table in summary(examined)]
    except StropError as error:
        log.warning("the report could not be written: %s", error)
        return
    except Exception as error:  # noqa: BLE001 (see above)
        log.warning("%s: the report could not be written: %s: %s", run.path, type(error).__name__, error)
        return
    trackers.report(examined.run.last_step, tables)
    _tell(session.model.name, examined.diagnosis, page)


def _tell(name: str | None, diagnosis: Diagnosis, page: Path) -> None:
    for finding in diagnosis.of(Severity.FAIL, Severity.WARN)[:MOST_LOGGED]:
        numbers = ", ".join(f"{k} {plain(v) if isinstance(v, int | float) else v}" for k, v in finding.numbers.items())
        level = logging.WARNING if finding.severity is Severity.FAIL else logging.INFO
        way = f". To try: {finding.remedies[0].words}" if finding.remedies else ""
        log.log(level, "%s: %s: %s (%s)%s", name, finding.severity, finding.claim, numbers or finding.id, way)
    log.info("%s: %s", name, diagnosis.verdict)
    log.info("%s: the report is %s", name, page)
