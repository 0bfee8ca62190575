"""Checkpoints: everything that a run needs to continue. A checkpoint is complete or absent, and its hashes are verified
before it is used. Floor 3.

In: named tensors of any dtype and shape, and a JSON state. Out: a folder

    checkpoint-{step}/
        shard-0000k-model-0000i-of-0000n.safetensors   the tensors that process k wrote, from 1, by
                                                       torch.distributed.checkpoint
        state.json                                     the state
        MANIFEST.json                                  step, size and SHA-256 of every file, versions, its own hash

There is no pickle in it. checkpoint_writer.py writes it. A load takes the newest checkpoint whose files are exactly
those of its manifest; a damaged one is renamed with a warning, and the next older one is tried.

The newest is the one with the highest step; times of files do not matter. A folder without our manifest is never
removed.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors

from strop import durable
from strop.errors import CheckpointError, foreign_errors
from strop.manifest import MANIFEST, Damaged, carries_manifest, read_manifest, verify_files
from strop.rundir import CHECKPOINT_NAME

logger = logging.getLogger(__name__)

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

STATE = "state.json"
SHOWN = 8
"""Differences listed in a message."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    step: the number of optimizer steps done. state: as it was saved. identity: hashes of what the run was made from
    (configuration, data, weights), by name, for the caller to compare. versions: those of the packages that wrote it.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    identity: Mapping[str, str]
    versions: Mapping[str, str]

    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the saved tensors into the given ones, in place, on any device.

        Raises:
            CheckpointError: a name, shape or dtype differs; then nothing has been copied.
        """
        reader = HuggingFaceStorageReader(str(self.path))
        with foreign_errors(lambda why: CheckpointError(f"cannot be read: {why}", where=str(self.path))):
            saved = reader.read_metadata().state_dict_metadata
            self._compare(cast(Mapping[str, TensorStorageMetadata], saved), tensors)
            if tensors:
                with own_errors():
                    read_tensors(
                        {name: tensor.detach() for name, tensor in tensors.items()},
                        storage_reader=reader,
                        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                        no_dist=True,
                    )

    def _compare(self, saved: Mapping[str, TensorStorageMetadata], wanted: Mapping[str, Tensor]) -> None:
        differences = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
        differences += [f"{name}: only in the checkpoint" for name in saved if name not in wanted]
        for name in saved.keys() & wanted.keys():
            there = (tuple(saved[name].size), saved[name].properties.dtype)
            here = (tuple(wanted[name].shape), wanted[name].dtype)
            if there != here:
                differences.append(f"{name}: {_words(*there)} in the checkpoint, {_words(*here)} in this run")
        if differences:
            shown = sorted(differences)[:SHOWN]
            more = len(differences) - len(shown)
            raise CheckpointError(
                "its tensors are not those of this run:"
                + "".join(f"\n    {line}" for line in shown)
                + (f"\n    and {more} more" if more else ""),
                where=str(self.path),
                expected="the same names, shapes and dtypes on both sides",
                fix="resume with the model, adapter, precision and optimizer settings that the run was started with",
            )


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is exactly what was saved; None: there is none. Damaged ones are renamed, with a
    warning."""
    if not run_dir.is_dir():
        return None
    durable.restore_replaced(run_dir)
    for at, path in sorted(numbered(run_dir).items(), reverse=True):
        if not carries_manifest(path):
            logger.warning("%s is ignored: it has no %s, so it is no checkpoint that strop finished", path, MANIFEST)
            continue
        try:
            return _open(path, at)
        except Damaged as damage:
            logger.warning("%s is damaged and not used: %s. %s", path, damage, _quarantine(path))
    return None


def _quarantine(path: Path) -> str:
    """Renames a damaged checkpoint. Returns a sentence about how that went."""
    aside = free_name(path, "bad")
    try:
        durable.rename(path, aside)
    except OSError as error:
        return f"It could not be renamed: {error}"
    return f"It is now {aside.name}"


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`. Unlike `newest`, it tries no other one.

    Raises:
        CheckpointError: it does not exist, or it is not what was saved.
    """
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder", where=str(path), expected="a checkpoint-{step} folder of a run"
        )
    try:
        return _open(path, None)
    except Damaged as damage:
        raise CheckpointError(
            f"the checkpoint cannot be used: {damage}",
            where=str(path),
            expected=f"exactly the files that its {MANIFEST} lists, unchanged",
            fix="name another checkpoint, or let `--resume auto` take the newest good one",
        ) from damage


def retire_newer(run_dir: Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step` to .retired-checkpoint-N, and returns their new paths.

    A resume from an older checkpoint needs this: the newer ones belong to a course of training that is now abandoned.
    """
    newer = sorted((at, p) for at, p in numbered(run_dir).items() if at > step and carries_manifest(p))
    moved = []
    for _, path in newer:
        aside = free_name(path, "retired")
        durable.rename(path, aside)
        moved.append(aside)
    return moved


def numbered(run_dir: Path) -> dict[int, Path]:
    """Step -> folder, of all folders named like a checkpoint. Symbolic links are left out."""
    with os.scandir(run_dir) as entries:
        names = [e.name for e in entries if CHECKPOINT_NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return {int(name.removeprefix("checkpoint-")): run_dir / name for name in names}


def free_name(path: Path, kind: str) -> Path:
    number, aside = 1, path.parent / f".{kind}-{path.name}"
    while os.path.lexists(aside):
        number += 1
        aside = path.parent / f".{kind}-{path.name}-{number}"
    return aside


def _open(path: Path, step: int | None) -> Checkpoint:
    """Verifies all files, then reads the state. Tensors are read by `load_into`."""
    manifest = read_manifest(path, step)
    verify_files(path, manifest)
    try:
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{STATE}: {error}") from error
    return Checkpoint(path, manifest.step, state, manifest.identity, manifest.versions)


@contextmanager
def own_errors() -> Iterator[None]:
    """A block with calls of torch.distributed.checkpoint: raises the error that it wraps."""
    ignore_single_process_warning()
    try:
        yield
    except CheckpointException as error:  # not an Exception; it wraps what went wrong on each rank
        cause = next(iter(error.failures.values()))[0]
        raise cause from error


def ignore_single_process_warning() -> None:
    """torch.distributed.checkpoint warns that it saves without the other processes, which is what it is asked for."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
