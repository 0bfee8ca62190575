"""What a run will take of its disk, known before the model is loaded. Floor 5.

From shapes alone: checkpoints (what trains and the optimizer's state), the final model, and the reference's log-probs
that lie in the run folder while it trains; a copy of the final model in `mount_dir`, and what the cache keeps of the
reference. A run that could leave no checkpoint and no model is refused. One that will run short later is warned of: a
save that fails causes a warning and is tried again, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch

from strop import disk
from strop.cachedir import cache_folder
from strop.data.store.table import Groups
from strop.disk import in_words
from strop.engine.optim import state_bytes
from strop.errors import SaveError
from strop.policy.model.configuration import model_config
from strop.policy.model.from_config import CannotBuildError
from strop.policy.precision import Precision
from strop.prepared import Prepared
from strop.types import Group


@dataclass(frozen=True)
class Space:
    """Bytes of one checkpoint, of the final model and of the reference's log-probs. most: how many checkpoints lie in
    the run folder at the same time, at most."""

    checkpoint: int
    most: int
    final: int
    reference: int

    @classmethod
    def of(cls, prepared: Prepared, precision: Precision, steps_done: int = 0) -> Space:
        """What a run will still write. steps_done: by an earlier process, if the run is resumed.

        Raises:
            CannotBuildError: the model cannot be built from its configuration alone.
        """
        config, shape = prepared.config, prepared.shape()
        training, wide = config.training, precision.master.itemsize
        trained = shape.adapters or shape.matrix + shape.others
        follows = prepared.objective.ref_sync is not None
        checkpoint = trained * (wide + state_bytes(training.optim, wide) + wide * follows)
        final = trained * (wide if shape.adapters else _saved_itemsize(prepared))
        final *= 2 if shape.adapters and config.lora.moves_base else 1  # twice the rank, for the base as it is
        reference = 0
        if prepared.scored_ahead:
            reference = wide * (_scored(prepared.data.train) + _scored(prepared.data.eval))
        return cls(checkpoint, _most_at_once(prepared, steps_done), final, reference)

    @property
    def least(self) -> int:
        """Bytes without which the run cannot end."""
        return (self.checkpoint if self.most else 0) + self.final + self.reference

    @property
    def peak(self) -> int:
        """Bytes that lie in the run folder at the same time, at most."""
        return self.checkpoint * self.most + self.final + self.reference

    def describe(self) -> str:
        parts = [(f"{self.most} checkpoints of {in_words(self.checkpoint)}", self.most)]
        parts += [(f"the final model of {in_words(self.final)}", self.final)]
        parts += [(f"log-probs of the reference of {in_words(self.reference)}", self.reference)]
        return ", ".join(text for text, is_there in parts if is_there)


def check_space(
    prepared: Prepared, precision: Precision, path: Path, *, steps_done: int = 0, freed: int = 0
) -> Iterator[str]:
    """Warnings about the disk of the run folder.

    Args:
        path: the run folder.
        steps_done: by an earlier process, if the run is resumed.
        freed: bytes that the run will remove before it writes.

    Raises:
        SaveError: there is no room for one checkpoint and the final model.
    """
    free = disk.free_bytes(path)
    try:
        space = Space.of(prepared, precision, steps_done)
    except CannotBuildError:
        return
    elsewhere = _elsewhere(prepared, space)
    beside = [other for other in elsewhere if disk.device_of(other.path) == disk.device_of(path)]
    for other in elsewhere:
        short = disk.free_bytes(other.path)
        if other not in beside and short is not None and short < other.size:
            yield (
                f"{other.path}: the disk will be full: {in_words(other.size)} needed for {other.what}, "
                f"{in_words(short)} free; {other.otherwise}. Make room or {other.instead}"
            )
    if free is None:
        return
    free += freed
    if free < space.least:
        raise SaveError(
            f"the disk is too full for this run to end: {in_words(space.least)} needed at least, {in_words(free)} free",
            where=str(path),
            expected=f"room for a checkpoint and what the run leaves; at the most {space.describe()}",
            fix="make room, or choose another training.output_dir",
        )
    peak = space.peak + sum(other.size for other in beside)
    if free < peak:
        parts = ", ".join([space.describe(), *(f"{other.what} of {in_words(other.size)}" for other in beside)])
        yield (
            f"{path}: the disk will be full: {in_words(peak)} needed, {in_words(free)} free "
            f"({parts}); checkpoints that do not fit are told and left out. Lower "
            "training.save_total_limit or make room"
        )


@dataclass(frozen=True)
class _Elsewhere:
    """What a run writes outside of its folder. size: bytes. otherwise: what becomes of it where there is no room.
    instead: what else can be done."""

    path: Path
    size: int
    what: str
    otherwise: str
    instead: str


def _elsewhere(prepared: Prepared, space: Space) -> list[_Elsewhere]:
    training, found = prepared.config.training, []
    if training.mount_dir:
        mount = Path(training.mount_dir).expanduser().absolute()
        otherwise, instead = "copying fails at the end of the run", "choose another training.mount_dir"
        found.append(_Elsewhere(mount, space.final, "the copy of the final model", otherwise, instead))
    if training.reference_store and space.reference:
        what = "what the cache keeps of the reference"
        otherwise, instead = "later runs score it again", "set STROP_CACHE to another folder"
        found.append(_Elsewhere(cache_folder("references"), space.reference, what, otherwise, instead))
    return found


def _most_at_once(prepared: Prepared, steps_done: int) -> int:
    """Checkpoints: those that are kept, the best one, and a new one while the oldest is still there."""
    config, num_steps = prepared.config, prepared.plan.num_steps
    left = num_steps - steps_done
    saves = ceil(left / config.training.save_steps)
    best = config.finetuning.load_best_model_at_end and bool(prepared.data.eval)
    evaluations = ceil(left / config.training.eval_steps) if best else 0
    keep = config.training.save_total_limit
    return min(left, saves + evaluations) if keep is None else min(left, saves + evaluations, keep + 1 + best)


def _saved_itemsize(prepared: Prepared) -> int:
    """Bytes per weight of a full model's files; 2 where nothing says it, as most have."""
    asked = prepared.config.training.save_dtype
    dtype = getattr(torch, asked) if asked != "auto" else getattr(model_config(prepared.model), "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def _scored(groups: Sequence[Group]) -> int:
    """Scored tokens of groups, without reading those that lie on disk."""
    if isinstance(groups, Groups):
        return int(groups.ragged("scored")[0].sum(dtype=np.int64))
    return sum(group.num_scored for group in groups)
