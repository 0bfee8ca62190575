"""The finished model, `final/`: written whole, with a manifest that says what it is and what it was made from. Floor 3.

The last step is in a checkpoint before anything is written here, so an export that fails is taken again by a resume,
without training. Its manifest lists every file with its hash; whoever loads the folder later finds damage out by it.
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
from strop.manifest import Damaged, read_manifest, seal, verify_listed
from strop.rundir import RunDir

log = logging.getLogger("strop")

RECIPE = "recipe"
"""Where the settings stand in the manifest's identity, as JSON."""


def export(
    run: RunDir,
    write: Callable[[Path], None],
    *,
    needed: int,
    step: int,
    recipe: Mapping[str, Any],
    made_from: Mapping[str, str],
) -> Path:
    """Let `write` fill a folder, and make it `final/` once it is whole, sealed and on disk.

    Args:
        needed: bytes that it will take. step: the model's. recipe, made_from: as in the checkpoints.

    Raises:
        SaveError: the disk is full or cannot be written; no `final/` is there then, or the one that was.
    """
    identity = {**made_from, RECIPE: json.dumps(recipe, sort_keys=True)}

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
    """What the run was made from, where `final/` is there and is what was written; nothing can be loaded from it."""
    if not run.is_finished:
        return None
    try:
        manifest = read_manifest(run.final)
        verify_listed(run.final, manifest.files)
        recipe = json.loads(manifest.identity[RECIPE])
    except (Damaged, KeyError, ValueError) as damage:
        log.warning("%s is not what was written: %s. It is made again", run.final, damage)
        return None
    identity = {name: value for name, value in manifest.identity.items() if name != RECIPE}
    return Checkpoint(run.final, manifest.step, {"recipe": recipe}, identity, manifest.versions)
