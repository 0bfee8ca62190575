"""What a resume finds in a run folder: a checkpoint, the best model so far, or a finished run. Floor 7."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from strop.config import RunConfig
from strop.engine import checkpoint, final_model
from strop.engine.checkpoint import Checkpoint
from strop.engine.ending import Ending, RunResult, ending_of
from strop.engine.loop import Loop
from strop.engine.recipe import check_finished, check_given, extends
from strop.errors import CheckpointError
from strop.rundir import TO_BE_REPLACED, RunDir
from strop.session import Session, reference_made_from

log = logging.getLogger("strop")


class Before(NamedTuple):
    """What a run continues from. done: the run is finished; its final model. saved: the checkpoint. extended: the steps
    of the finished run that is to be longer."""

    done: Checkpoint | None = None
    saved: Checkpoint | None = None
    extended: int | None = None


def look_in(config: RunConfig, run: RunDir, resume: str | None) -> Before:
    """Looks at what is in the run folder, and at where the mirror will be: now, not after hours.

    Raises:
        CheckpointError: what is there cannot be continued, a finished run had other settings, or the mirror cannot be
            made.
    """
    done = final_model.finished(run) if resume else None
    extended = None
    if done and resume == "auto" and extends(done, config, num_steps := steps_of(done, run)):
        done, extended = None, num_steps  # the old model stays until the new one is there
    if done:  # what can be seen at once; the rest later, as for a run that is not finished
        check_given(done, config, str(resume))
    saved = None if done else checkpoint_to_resume(run, resume)
    look_at_mirror(config, run, begins=not (done or saved))
    return Before(done, saved, extended)


def already_finished(done: Checkpoint, session: Session, run: RunDir) -> RunResult:
    """The result of a finished run, after checking that the configuration still describes that run."""
    made_from = session.made_from
    if "reference" in done.identity:
        with session.reference() as reference:
            made_from = made_from | reference_made_from(reference)
    check_finished(done, session.config, made_from)
    log.info("%s is finished: its model is in %s; nothing is trained", session.model.name, run.final)

    def how() -> Ending:
        mirror(session.config, run)
        ending = ending_of(run.path)
        if steps_of(done, run) != ending.num_steps:
            log.warning(
                "%s: result.json is of a course of %d steps, whose model could not be written; that in %s is of one "
                "of %d steps. --resume with the settings of the longer one writes its model",
                *(session.model.name, ending.num_steps, run.final, steps_of(done, run)),
            )
        return ending

    return RunResult(session.model.name, run.path, session.world.on_main(how))


def steps_of(done: Checkpoint, run: RunDir) -> int:
    """How many steps a finished run was to have. result.json may be of a longer course by now, whose model could not be
    written; it says it for runs of earlier versions.

    Raises:
        CheckpointError: neither says it.
    """
    found: int | None = done.state["num_steps"]
    return ending_of(run.path).num_steps if found is None else found


def checkpoint_to_resume(run: RunDir, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `--resume` asks for: the newest whole one of the folder, or the one at the given path.

    Returns:
        None without `--resume`, or where the folder has no checkpoint and the run has to start.

    Raises:
        CheckpointError: the path cannot be resumed from, or the run is finished.
    """
    if resume is None:
        return None
    # what lies beside it is needed, too, so it has a folder around it whatever it is called: `.` names none
    named = None if resume == "auto" else Path(os.path.abspath(Path(resume).expanduser()))
    if run.replaces and (named is None or named.is_relative_to(run.path)):
        if named is not None:
            raise CheckpointError(
                "the run here was going to be overwritten, so it cannot be resumed",
                where=f"--resume {resume}",
                fix=f"give --resume alone, or --overwrite; to keep the earlier run, remove {run.path / TO_BE_REPLACED}",
            )
        return None
    found = checkpoint.newest(run.path) if named is None else checkpoint.open_checkpoint(named)
    if found is None and run.is_finished:
        raise CheckpointError(
            "the run is finished, its final model is damaged or to be trained further, and no checkpoint is left",
            where=str(run.final),
            fix="train anew with --overwrite or in another training.output_dir",
        )
    log.info("resuming from %s", found.path) if found else log.info("no checkpoint in %s: starting", run.path)
    return found


def best_checkpoint(run: RunDir, saved: Checkpoint | None, step: int) -> Path:
    """The checkpoint of the best evaluation. If that was before the resume, it lies beside the resumed checkpoint,
    which may be in another folder."""
    return (saved.path.parent if saved and step <= saved.step else run.path) / f"checkpoint-{step}"


def look_for_best(loop: Loop, run: RunDir, saved: Checkpoint) -> None:
    """Warns at the start, not after the training, if the checkpoint of the best model so far is missing or damaged."""
    best = loop.state.best_step
    if best is None or not loop.config.finetuning.load_best_model_at_end:
        return
    path = best_checkpoint(run, saved, best)
    if (why := loop.world.on_main(lambda: _what_is_wrong(path, saved))) is not None:
        log.warning("the best model so far, %s, %s: a later one will be final", path, why)
        loop.state.best_step = None
        loop.saves.resumed(loop.state)  # nor does the run come back to it where a later one cannot be saved


def _what_is_wrong(path: Path, saved: Checkpoint) -> str | None:
    """Why a checkpoint cannot be used; None: it can. saved: one that has been looked at."""
    if not path.is_dir():
        return "is gone"
    try:
        if path != saved.path:
            checkpoint.open_checkpoint(path)
    except CheckpointError as error:
        return f"cannot be used ({error.found})"
    return None


def look_at_mirror(config: RunConfig, run: RunDir, *, begins: bool) -> None:
    """Refuses a `training.mount_dir` that cannot be used, before the run. begins: nothing of the run is there yet."""
    if config.training.mount_dir is None:
        return
    final = run.mirror_target(config.training.mount_dir) / run.final.name
    if begins and final.exists():  # perhaps of another run whose model has the same name
        log.warning("training.mount_dir: %s is there already, and will be replaced at the end of this run", final)


def mirror(config: RunConfig, run: RunDir) -> None:
    """Copies the run to `training.mount_dir`, if that is given."""
    if config.training.mount_dir:
        log.info("mirrored to %s", run.mirror(config.training.mount_dir))
