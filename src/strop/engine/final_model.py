"""`final/`, the finished model. It is complete or absent, and has a manifest of what it was made from. Floor 3.

The last step is saved in a checkpoint first, so if the export fails, a resume repeats it without training. The manifest
lists every file with its hash, by which later readers can detect damage.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from strop.disk import ensure_space, remedy, room
from strop.engine.checkpoint import Checkpoint
from strop.errors import CheckpointError, SaveError, foreign_errors
from strop.manifest import NUM_STEPS, RECIPE, Damaged, read_manifest, seal, verify_listed
from strop.rundir import RunDir

log = logging.getLogger("strop")


def export(
    run: RunDir,
    write: Callable[[Path], None],
    *,
    needed: int,
    step: int,
    num_steps: int,
    recipe: Mapping[str, Any],
    made_from: Mapping[str, str],
) -> Path:
    """Lets `write` fill a folder, and renames it to `final/` once it is complete and on disk.

    Args:
        needed: bytes that the model will take.
        step: the step that the model is of, in a run that was to have `num_steps`.
        recipe: the settings that decide the result, as in checkpoints.
        made_from: hashes of what the run was made from, as in checkpoints.

    Raises:
        SaveError: the disk is full or cannot be written. An earlier `final/` is still there then.
    """
    identity = {**made_from, RECIPE: json.dumps(recipe, sort_keys=True), NUM_STEPS: str(num_steps)}

    def failed(why: str, to_do: str) -> SaveError:
        return SaveError(
            f"the final model could not be written: {why}",
            where=str(run.final),
            fix=f"{to_do}, then --resume: nothing that a checkpoint holds is trained again",
        )

    def fill(folder: Path) -> None:
        with foreign_errors(lambda why: SaveError(why + room(why, folder))):
            write(folder)
            seal(folder, step, identity)

    try:
        ensure_space(run.path, needed)
    except SaveError as error:
        raise failed(error.found, "make room") from error
    try:
        return run.publish_final(fill)
    except CheckpointError as error:
        raise failed(error.found, remedy(error.found)) from error


def finished(run: RunDir) -> Checkpoint | None:
    """What a finished run was made from; None if `final/` is missing or damaged. The result holds no tensors; its state
    has `num_steps`, which runs of earlier versions did not write down."""
    if not run.is_finished:
        return None
    try:
        manifest = read_manifest(run.final)
        verify_listed(run.final, manifest.files)
        recipe = json.loads(manifest.identity[RECIPE])
        num_steps = int(manifest.identity[NUM_STEPS]) if NUM_STEPS in manifest.identity else None
    except (Damaged, KeyError, ValueError) as damage:
        log.warning("%s is damaged: %s. It is written again", run.final, damage)
        return None
    identity = {name: value for name, value in manifest.identity.items() if name not in (RECIPE, NUM_STEPS)}
    state = {"recipe": recipe, "num_steps": num_steps}
    return Checkpoint(run.final, manifest.step, state, identity, manifest.versions)
