"""Writes checkpoints, by one process or by several together. Floor 3.

A save writes everything under a temporary name, syncs every file and the folder, renames it, syncs the run folder, and
only then removes older checkpoints. Each process writes its own tensors; rank 0 writes the rest. What a checkpoint
holds is said in checkpoint.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar, cast

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.distributed.tensor import DTensor

from strop import durable
from strop.disk import ensure_space, remedy, room
from strop.engine.checkpoint import JSON, SHOWN, STATE, free_name, numbered, own_errors
from strop.errors import CheckpointError, SaveError, foreign_errors
from strop.manifest import MANIFEST, Damaged, FileEntry, Manifest, carries_manifest, read_manifest
from strop.policy.precision import nonfinite
from strop.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")

ALONE = World.alone("cpu")
MAX_FILE_BYTES = 2**28
"""Approximate size of a tensor file. A save holds the tensors of one file in host memory at a time."""


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, JSON],
    *,
    keep: int | None,
    protect: Collection[int] = (),
    identity: Mapping[str, str] = MappingProxyType({}),
    world: World = ALONE,
) -> Path:
    """Writes checkpoint-{step} and removes older ones. When this returns, the checkpoint survives a power cut.

    A failure leaves all older checkpoints as they were, and nothing of the new one.

    Args:
        tensors: those that this process writes, by name (`Strategy.own_share`). Two names may stand for one tensor;
            otherwise no two tensors may share memory.
        keep: how many checkpoints to keep besides the protected ones, including this one; None: all.
        protect: steps whose checkpoints are never removed.
        world: the processes that save together. Rank 0 makes the folder, lists the files of all and publishes it.

    Raises:
        SaveError: the disk is full or cannot be written; in all processes.
        CheckpointError: a tensor holds NaN or an infinity; in all processes.
    """
    assert step >= 0 and (keep is None or keep > 0)
    refuse_nonfinite(f"no checkpoint of step {step}", tensors, world)
    (needed,) = world.sum([num_bytes(tensors)])
    making = _Making(run_dir / f"checkpoint-{step}", step, needed)
    (temp,) = _agreed(world, lambda: [making.begin()] if world.is_main else [])
    try:
        written = _agreed(world, lambda: [making.write_tensors(temp, tensors, world.rank + 1)])
        files = {name: entry for own in written for name, entry in own.items()}
        _agreed(world, lambda: [making.publish(temp, files, state, identity)] if world.is_main else [])
    finally:
        if world.is_main:
            _remove_quietly(temp)
    if world.is_main:
        _rotate(run_dir, step, keep, protect)
    return making.target


def _agreed(world: World, work: Callable[[], list[T]]) -> list[T]:
    """What `work` gives in all processes, by rank.

    Raises:
        SaveError: in all processes, where `work` raises one in any.
    """
    own: list[T] | SaveError
    try:
        own = work()
    except SaveError as error:
        own = error  # as a value, so that every process can raise it
    found: list[T] = []
    for one in world.gather(own):
        if isinstance(one, SaveError):
            raise one
        found += one
    return found


@dataclass(frozen=True)
class _Making:
    """The making of one checkpoint. needed: bytes on disk, in all.

    Its methods raise SaveError where the disk does not take what is written.
    """

    target: Path
    step: int
    needed: int

    def begin(self) -> Path:
        """A new folder under a temporary name, if there is room."""
        ensure_space(self.target.parent, self.needed)
        temp = self.target.parent / durable.hidden_name("tmp", str(self.step))
        with self._failing():
            try:
                durable.make_folder(temp)
            except OSError:
                _remove_quietly(temp)
                raise
        return temp

    def write_tensors(self, temp: Path, tensors: Mapping[str, Tensor], number: int) -> dict[str, FileEntry]:
        with self._failing(), foreign_errors(self._failed):
            return write_tensor_files(temp, tensors, number)

    def publish(
        self, temp: Path, files: Mapping[str, FileEntry], state: Mapping[str, JSON], identity: Mapping[str, str]
    ) -> Path:
        """Adds state and manifest, and gives the folder its name, which is returned."""
        with self._failing():
            own = _write(temp / STATE, json.dumps(state, indent=1))
            _write(temp / MANIFEST, Manifest.of(self.step, {**files, STATE: own}, identity).to_text())
            durable.sync_folder(temp)
            if os.path.lexists(self.target) and not carries_manifest(self.target):
                _make_way(self.target)
            durable.replace_folder(temp, self.target)
        return self.target

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error

    def _failed(self, why: str) -> SaveError:
        return SaveError(
            f"the checkpoint could not be written: {why}{room(why, self.target, self.needed)}",
            where=str(self.target),
            expected="older checkpoints are untouched",
            fix=f"{remedy(why)}; a run that has ended goes on with --resume",
        )


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes on disk that this process's tensors of a checkpoint take, with an estimate for headers and the state."""
    return sum(local_part(t).nbytes for t in tensors.values()) + 256 * len(tensors) + 4096


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the whole tensor, or its part of a sharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_nonfinite(what: str, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
    """Refuses to write tensors with a NaN: a checkpoint with one would displace good ones. Collective.

    Args:
        tensors: those of this process.

    Raises:
        CheckpointError: there is a NaN or an infinity; the message begins with `what`.
    """
    own = nonfinite({name: local_part(tensor) for name, tensor in tensors.items()})
    if bad := sorted({name for names in world.gather(own) for name in names}):
        raise CheckpointError(
            f"{what}: NaN or infinity in {', '.join(bad[:SHOWN])}"
            + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""),
            fix="resume from the last checkpoint, with a lower learning rate or another precision",
        )


def write_tensor_files(folder: Path, tensors: Mapping[str, Tensor], number: int = 1) -> dict[str, FileEntry]:
    """Writes and syncs the tensor files of one process. Returns the size and hash of each file by its name.

    Args:
        number: of the process, from 1, which names its files.
    """
    if not tensors:
        return {}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    recorder = _RecordedFiles(number)
    writer.fs = recorder  # so that every byte goes through our own files, which hash and sync
    writer.sync_files = False
    with own_errors():
        write_tensors(
            _separate(tensors),
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    return recorder.written


class _RecordedFiles(FileSystem):
    """Lets torch.distributed.checkpoint write through our own files, which hash and sync what they write. As it does
    not know of the other processes, it numbers the files of each as those of the first."""

    def __init__(self, number: int) -> None:
        self.written: dict[str, FileEntry] = {}
        self._prefix = f"shard-{number:05}-"

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        assert mode == "wb"
        name = self._prefix + Path(path).name.removeprefix("shard-00001-")
        with durable.NewFile(Path(path).with_name(name)) as file:
            yield cast(IO[bytes], file)
        self.written[name] = FileEntry(bytes=file.num_bytes, sha256=file.sha256)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of the file it goes to, from 1. Files are filled in the order of the tensors."""
    index, filled = 1, 0
    files = {}
    for name, tensor in tensors.items():
        size = local_part(tensor).nbytes
        if filled and filled + size > MAX_FILE_BYTES:
            index, filled = index + 1, 0
        files[name] = index
        filled += size
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
    aside = free_name(target, "foreign")
    durable.rename(target, aside)
    logger.warning("%s had no %s, so strop did not write it; it is now %s", target, MANIFEST, aside.name)


def _remove_quietly(path: Path) -> None:
    try:
        durable.remove(path)
    except OSError as error:  # the next start removes it
        logger.warning("%s could not be removed: %s", path, error)


def _rotate(run_dir: Path, saved: int, keep: int | None, protect: Collection[int]) -> None:
    if keep is None:
        return
    try:
        ours = {at: path for at, path in numbered(run_dir).items() if _is_sound(path, at)}
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
