"""Checkpoints: everything that a run needs to continue. A checkpoint is complete or absent, and its hashes are verified
before it is used. Floor 3.

In: named tensors of any dtype and shape, and a JSON state. Out: a folder

    checkpoint-{step}/
        shard-00001-model-0000i-of-0000n.safetensors   the tensors, by torch.distributed.checkpoint
        state.json                                     the state
        MANIFEST.json                                  step, size and SHA-256 of every file, versions, its own hash

There is no pickle in it. A save writes everything under a temporary name, syncs every file and the folder, renames it,
syncs the run folder, and only then removes older checkpoints. A load takes the newest checkpoint whose files are
exactly those of its manifest; a damaged one is renamed with a warning, and the next older one is tried.

The newest is the one with the highest step; times of files do not matter. A folder without our manifest is never
removed.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.distributed.tensor import DTensor

from strop import durable
from strop.disk import ensure_space, remedy, room
from strop.errors import CheckpointError, SaveError, foreign_errors
from strop.manifest import MANIFEST, Damaged, FileEntry, Manifest, carries_manifest, read_manifest, verify_files
from strop.policy.precision import nonfinite
from strop.rundir import CHECKPOINT_NAME

logger = logging.getLogger(__name__)

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

STATE = "state.json"
MAX_FILE_BYTES = 2**28
"""Approximate size of a tensor file. A save holds the tensors of one file in host memory at a time."""
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
                with _dcp():
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


# ---- saving


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    *,
    keep: int | None,
    protect: Collection[int] = (),
    identity: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Writes checkpoint-{step} and removes older ones. When this returns, the checkpoint survives a power cut.

    A failure leaves all older checkpoints as they were, and nothing of the new one.

    Args:
        tensors: by name. Two names may stand for one tensor; otherwise no two tensors may share memory.
        keep: how many checkpoints to keep besides the protected ones, including this one; None: all.
        protect: steps whose checkpoints are never removed.

    Raises:
        SaveError: the disk is full or cannot be written.
        CheckpointError: a tensor holds NaN or an infinity.
    """
    assert step >= 0 and (keep is None or keep > 0)
    refuse_nonfinite(f"no checkpoint of step {step}", tensors)
    target = run_dir / f"checkpoint-{step}"
    needed = num_bytes(tensors)
    ensure_space(run_dir, needed)
    temp = run_dir / durable.hidden_name("tmp", str(step))
    try:
        durable.make_folder(temp)
        with foreign_errors(lambda why: _save_failed(target, needed, why)):
            files = write_tensor_files(temp, tensors)
        files[STATE] = _write(temp / STATE, json.dumps(state, indent=1))
        _write(temp / MANIFEST, Manifest.of(step, files, identity).to_text())
        durable.sync_folder(temp)
        if os.path.lexists(target) and not carries_manifest(target):
            _make_way(target)
        durable.replace_folder(temp, target)
    except OSError as error:
        raise _save_failed(target, needed, error.strerror or str(error)) from error
    finally:
        _remove_quietly(temp)
    _rotate(run_dir, step, keep, protect)
    return target


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes on disk that a checkpoint of `tensors` takes, with an estimate for headers and the state."""
    return sum(t.nbytes for t in tensors.values()) + 256 * len(tensors) + 4096


def refuse_nonfinite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuses to write tensors with a NaN: a checkpoint with one would displace good ones.

    Raises:
        CheckpointError: there is a NaN or an infinity; the message begins with `what`.
    """
    if bad := nonfinite(tensors):
        raise CheckpointError(
            f"{what}: NaN or infinity in {', '.join(bad[:SHOWN])}"
            + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""),
            fix="resume from the last checkpoint, with a lower learning rate or another precision",
        )


def write_tensor_files(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
    """Writes and syncs the tensor files. Returns the size and hash of each file by its name."""
    if not tensors:
        return {}
    assert not any(isinstance(t, DTensor) for t in tensors.values()), "one process saves whole tensors"
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    recorder = _RecordedFiles()
    writer.fs = recorder  # so that every byte goes through our own files, which hash and sync
    writer.sync_files = False
    with _dcp():
        write_tensors(
            _separate(tensors),
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    return recorder.written


class _RecordedFiles(FileSystem):
    """Lets torch.distributed.checkpoint write through our own files, which hash and sync what they write."""

    def __init__(self) -> None:
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        assert mode == "wb"
        with durable.NewFile(Path(path)) as file:
            yield cast(IO[bytes], file)
        self.written[Path(path).name] = FileEntry(bytes=file.num_bytes, sha256=file.sha256)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of the file it goes to, from 1. Files are filled in the order of the tensors."""
    index, filled = 1, 0
    files = {}
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > MAX_FILE_BYTES:
            index, filled = index + 1, 0
        files[name] = index
        filled += tensor.nbytes
    return files


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors requires. A tensor with two names (8-bit optimizers keep
    one table for all weights) is copied for the second name."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous()
        separate[name] = dense.clone() if id(tensor) in seen else dense
        seen.add(id(tensor))
    return separate


def _write(path: Path, text: str) -> FileEntry:
    with durable.NewFile(path) as file:
        file.write(text.encode())
    return FileEntry(bytes=file.num_bytes, sha256=file.sha256)


def _make_way(target: Path) -> None:
    # A folder of this name that strop did not write must not stop a run after hours, and must not be deleted either.
    aside = _free_name(target, "foreign")
    durable.rename(target, aside)
    logger.warning("%s had no %s, so strop did not write it; it is now %s", target, MANIFEST, aside.name)


def _save_failed(target: Path, needed: int, why: str) -> SaveError:
    return SaveError(
        f"the checkpoint could not be written: {why}{room(why, target, needed)}",
        where=str(target),
        expected="older checkpoints are untouched",
        fix=f"{remedy(why)}; a run that has ended goes on with --resume",
    )


def _remove_quietly(path: Path) -> None:
    try:
        durable.remove(path)
    except OSError as error:  # the next start removes it
        logger.warning("%s could not be removed: %s", path, error)


def _rotate(run_dir: Path, saved: int, keep: int | None, protect: Collection[int]) -> None:
    if keep is None:
        return
    try:
        ours = {at: path for at, path in _numbered(run_dir).items() if _is_sound(path, at)}
        others = sorted(ours.keys() - {saved, *protect}, reverse=True)
        for at in others[keep if saved in protect else keep - 1 :]:
            durable.discard_folder(ours[at])
    except OSError as error:  # the new checkpoint is safe; an old one too many is no reason to stop a run
        logger.warning("%s: an older checkpoint could not be removed: %s", run_dir, error)


def _is_sound(path: Path, step: int) -> bool:
    try:
        return read_manifest(path, step).step == step
    except Damaged:
        return False


# ---- finding and verifying


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is exactly what was saved; None: there is none. Damaged ones are renamed, with a
    warning."""
    if not run_dir.is_dir():
        return None
    durable.restore_replaced(run_dir)
    for at, path in sorted(_numbered(run_dir).items(), reverse=True):
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
    aside = _free_name(path, "bad")
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
    newer = sorted((at, p) for at, p in _numbered(run_dir).items() if at > step and carries_manifest(p))
    moved = []
    for _, path in newer:
        aside = _free_name(path, "retired")
        durable.rename(path, aside)
        moved.append(aside)
    return moved


def _numbered(run_dir: Path) -> dict[int, Path]:
    """Step -> folder, of all folders named like a checkpoint. Symbolic links are left out."""
    with os.scandir(run_dir) as entries:
        names = [e.name for e in entries if CHECKPOINT_NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return {int(name.removeprefix("checkpoint-")): run_dir / name for name in names}


def _free_name(path: Path, kind: str) -> Path:
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
def _dcp() -> Iterator[None]:
    """Silences a warning of torch.distributed.checkpoint about single processes, and raises the error that it wraps."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:  # not an Exception; it wraps what went wrong on each rank
        cause = next(iter(error.failures.values()))[0]
        raise cause from error
