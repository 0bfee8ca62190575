"""What a resume finds in a run folder: a checkpoint, the best model so far, or a finished run. Floor 7."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from strop.config import RunConfig
from strop.engine import checkpoint
from strop.engine.checkpoint import Checkpoint
from strop.engine.ending import Ending, RunResult, ending_of
from strop.engine.loop import Loop
from strop.engine.recipe import check_finished
from strop.errors import CheckpointError
from strop.rundir import TO_BE_REPLACED, RunDir
from strop.session import Session, reference_made_from

log = logging.getLogger("strop")


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


def mirror(config: RunConfig, run: RunDir) -> None:
    """Copies the run to `training.mount_dir`, if that is given."""
    if config.training.mount_dir:
        log.info("mirrored to %s", run.mirror(config.training.mount_dir))
