"""Takes a step of a run again, and compares it with the line that the ledger has of it. Floor 8.

In: a run folder and a step. Out: a `Replayed`. The run is built again from its config.yaml, starts from the nearest
checkpoint before the step, or from the initial model, and takes all steps up to it. On the same CPU, with as many
processes and threads and the same packages, the numbers are the same to the last bit, dropout included. Nothing is
written into the run folder.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from strop.config import RunConfig, load_config, of_model
from strop.config.sections import GpuSection
from strop.device import start_world
from strop.distributed import find_place
from strop.durable import to_json
from strop.engine.checkpoint import Checkpoint, open_checkpoint
from strop.engine.environment import (
    changed_since,
    describe_environment,
    launch_record,
    processes_at,
    record_at,
    resumed_since,
)
from strop.engine.ledger import ledger_line
from strop.engine.loop import Loop
from strop.engine.progress import Progress
from strop.engine.recipe import MADE_FROM, cut_matters, recipe_of
from strop.engine.step_records import StepRecord
from strop.errors import CheckpointError, ConfigError
from strop.policy.policy import Policy
from strop.preflight import check
from strop.replay.row_scores import RowScores, row_scores
from strop.report.ledgers import Line, differing, read_ledger
from strop.rundir import CHECKPOINT_NAME
from strop.session import Session, Splits, reference_made_from
from strop.world import World

log = logging.getLogger("strop")

AFTER = "weights_after"
"""In a comparison: the weights after the step, which the ledger's next line has."""


@dataclass(frozen=True)
class Retaken:
    """One step that was taken again. recorded, found: the fields in which the ledger and this computation differ."""

    step: int
    recorded: Mapping[str, Any]
    found: Mapping[str, Any]

    @property
    def is_same(self) -> bool:
        return not self.found


@dataclass(frozen=True)
class Replayed:
    """A step that was taken again.

    start: the step of the checkpoint that it began with; 0: the initial model. steps: every step that was taken and
    that the ledger has, the last one being the one asked for. line: what the ledger has of it. has_after: whether the
    weights after it could be compared. environment: what is not as it was when the run was launched. rows: of the step,
    if they were asked for. resumed: after which step the run was resumed since. processes: how many took the step then,
    and how many did now. masks_differ: these are not as many, and the masks of dropout depend on it.
    """

    step: int
    start: int
    steps: Sequence[Retaken]
    line: Line
    has_after: bool
    environment: Sequence[str]
    rows: Sequence[RowScores]
    resumed: int | None = None
    processes: tuple[int, int] = (1, 1)
    masks_differ: bool = False

    @property
    def first_difference(self) -> Retaken | None:
        return next((step for step in self.steps if not step.is_same), None)


def replay(folder: Path, step: int, *, with_rows: bool = False) -> Replayed:
    """Take a step again, in the processes that a launcher has started, all of which call this; else in one.

    Args:
        step: from 1.
        with_rows: score its rows, too, before it is taken.

    Raises:
        StropError: the run has no such step; or its model, rows or checkpoint are not there any more, or are others.
    """
    config = _config(folder)
    start = _start(folder, step)
    lines = {line["step"]: line for line in read_ledger(folder) if start < line["step"] <= step + 1}
    if step not in lines:
        raise _no_such_step(folder, step)
    check(config)
    with tempfile.TemporaryDirectory() as scratch, start_world(_devices(config)) as world:
        before = processes_at(folder, step)
        environment = _environment(folder, config, step, world)
        with (
            Progress.of_run(config, world) as progress,
            Session(config, config.models[0], world, resumed=_resumed(folder, start, config)) as session,
        ):
            saved = open_checkpoint(folder / f"checkpoint-{start}") if start else None
            with _loop(session, saved, folder, progress, Path(scratch)) as (loop, recorded):
                if saved:
                    loop.restore(saved)
                taken = _taken(loop, recorded, lines, start, step, progress, session if with_rows else None)
        masks_differ = before != world.size and cut_matters(config)
        taken = replace(taken, environment=environment, resumed=resumed_since(folder, step))
        return replace(taken, processes=(before, world.size), masks_differ=masks_differ)


def _taken(
    loop: Loop,
    recorded: list[StepRecord],
    lines: Mapping[int, Line],
    start: int,
    step: int,
    progress: Progress,
    session: Session | None,
) -> Replayed:
    """Takes the steps. session: that of the run, if the rows of the last step are to be scored."""
    task = progress.task("replay", step - start)
    retaken, rows = [], []
    for at in range(start + 1, step + 1):
        line = lines.get(at)
        if line is not None and line.get("budget_tokens", 0) not in (0, loop.gradients.budget_tokens):
            loop.gradients.cut_finer(line["budget_tokens"])  # memory had run out before this step
        if at == step and session is not None:
            rows = row_scores(session, loop.gradients, at)
        loop.step(at)
        found = json.loads(to_json(ledger_line(recorded.pop())))
        after = lines.get(at + 1, {}).get("weights")
        if after is not None:
            found[AFTER] = loop.digest.of(loop.digest.sample().cpu())
        if line is not None:
            retaken.append(_compared({**line, **({} if after is None else {AFTER: after})}, found))
        task.step()
    task.close()
    return Replayed(step, start, retaken, lines[step], step + 1 in lines, (), rows)


def _compared(recorded: Line, found: Line) -> Retaken:
    names = [*differing(recorded, found), *([AFTER] if recorded.get(AFTER) != found.get(AFTER) else [])]
    return Retaken(found["step"], *({name: line.get(name) for name in names} for line in (recorded, found)))


def _config(folder: Path) -> RunConfig:
    """The configuration of the run.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            "there is no config.yaml", where=str(folder), expected="the folder of a run: training.output_dir/NAME"
        )
    config = load_config(path)
    config = config.with_values({"finetuning.resume_from_checkpoint": None}, "strop replay")
    return of_model(config, config.models[0])


def _start(folder: Path, step: int) -> int:
    """The step of the nearest checkpoint before `step` that is whole; 0: there is none."""
    if step < 1:
        raise _no_such_step(folder, step)
    there = [int(p.name.rpartition("-")[2]) for p in folder.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)]
    for at in sorted((at for at in there if 0 < at < step), reverse=True):
        try:
            return open_checkpoint(folder / f"checkpoint-{at}").step
        except CheckpointError as error:
            log.warning("%s; an earlier checkpoint is taken", error.found)
    return 0


def _no_such_step(folder: Path, step: int) -> ConfigError:
    first = last = 0
    for line in read_ledger(folder):
        first, last = first or line["step"], line["step"]
    return ConfigError(
        f"the ledger has no step {step}",
        where=f"--step {step}",
        expected=f"a step from {first} to {last}" if last else "a run that has done a step",
    )


def _resumed(folder: Path, start: int, config: RunConfig) -> Checkpoint:
    """What the session continues from. Before the first checkpoint, that is the launch: its way of computing products
    is in environment.json."""
    if start:
        return open_checkpoint(folder / f"checkpoint-{start}")
    launch = launch_record(folder) or {}
    return Checkpoint(folder, 0, {"recipe": recipe_of(config), "products": launch.get("products")}, {}, {})


def _devices(config: RunConfig) -> GpuSection:
    """As many as there are processes, however many the run was configured for."""
    return config.gpu.model_copy(update={"num_processes": None, "device_ids": None}) if find_place() else GpuSection()


def _environment(folder: Path, config: RunConfig, step: int, world: World) -> list[str]:
    launch = launch_record(folder)
    if launch is None:
        return ["environment.json cannot be read, so nothing is known of the computer that the run was made on"]
    now = describe_environment(seed=config.seed, processes=[{}] * world.size)
    return list(changed_since(record_at(launch, step), now))


@contextmanager
def _loop(
    session: Session, saved: Checkpoint | None, folder: Path, progress: Progress, scratch: Path
) -> Iterator[tuple[Loop, list[StepRecord]]]:
    """The loop of the run, and the records of its steps; torch's generators continue as they were afterwards."""
    made_from = dict(session.made_from)
    splits = _splits(session, made_from, progress, scratch)
    _check_made_from(folder, saved, made_from)
    recorded: list[StepRecord] = []
    source = session.source(splits, scratch)
    devices = [session.world.device] if session.world.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        outputs = _Recorder(recorded, progress.note)
        parts = (session.policy, session.prepared.objective, source, session.cuts, outputs, session.world)
        loop = Loop(session.config, *parts)
        try:
            yield loop, recorded
        finally:
            loop.gradients.close()


def _splits(session: Session, made_from: dict[str, str], progress: Progress, scratch: Path) -> Splits:
    """The groups, with the reference's log-probs where the method has a reference that does not change. The hashes of
    a reference that is another model are added to `made_from`."""
    if session.config.rollout.enabled:
        reference = session.kept_reference
        if isinstance(reference, Policy) and reference is not session.policy:
            made_from |= reference_made_from(reference)
    if not session.prepared.scored_ahead:
        return session.groups()
    with session.reference() as reference:
        if reference is not session.policy:
            made_from |= reference_made_from(reference)
        return session.score(reference, progress, scratch)


def _check_made_from(folder: Path, saved: Checkpoint | None, made_from: Mapping[str, str]) -> None:
    """Refuses other rows or weights than those of the run: what was found would say nothing about it."""
    identity = saved.identity if saved else _fingerprint(folder)
    changed = [MADE_FROM[name] for name, value in made_from.items() if identity.get(name, value) != value]
    if changed:
        raise CheckpointError(
            "the run cannot be taken again, since what it was made from has changed:"
            + "".join(f"\n    {line}" for line in changed),
            where=str(folder),
            expected="the rows and weights that the run was trained with",
            fix="put them back where config.yaml names them",
        )


def _fingerprint(folder: Path) -> Mapping[str, str]:
    try:
        found = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        return {"data": str(found["fingerprint"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class _Recorder:
    """Keeps the records of steps; nothing is logged, saved or evaluated."""

    def __init__(self, recorded: list[StepRecord], note: Callable[[str], None]) -> None:
        self._recorded, self.note = recorded, note

    def step(self, record: StepRecord) -> None:
        self._recorded.append(record)

    def line(self, line: Mapping[str, Any]) -> None:
        raise AssertionError("single steps log no line")

    def row_losses(self, step: int, losses: Any) -> None:
        raise AssertionError("single steps evaluate nothing")

    def save(
        self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], protect: Sequence[int], world: World
    ) -> Path:
        raise AssertionError("single steps save nothing")

    @contextmanager
    def evaluating(self, num_groups: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None
