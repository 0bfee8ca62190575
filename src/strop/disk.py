"""What a disk has to say, for a person: how much is free, and why something cannot be written. Floor 0, stdlib only."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from strop.errors import CheckpointError, SaveError


def free_bytes(path: Path) -> int | None:
    """Bytes that a file at `path`, which need not exist, could take; null where the system does not say."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def in_words(num_bytes: int | None) -> str:
    """Bytes for a person."""
    if num_bytes is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def ensure_space(path: Path, needed: int) -> None:
    """Raises SaveError where the disk of `path` has fewer than `needed` bytes free."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise SaveError(
            f"the disk is too full: {in_words(needed)} needed, {in_words(free)} free",
            where=str(path),
            fix="make room, lower training.save_total_limit, or choose another training.output_dir; then --resume",
        )


def refuse_in_the_way(path: Path) -> None:
    """Say, without making it, that a folder cannot be made because something else is there, or nobody may.

    Raises:
        CheckpointError: it, or a folder that it would lie in, is no folder, or cannot be written.
    """
    nearest = next((p for p in (path, *path.parents) if os.path.lexists(p)), None)
    if nearest is not None and not nearest.is_dir():
        raise unusable(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if nearest is not None and not os.access(nearest, os.W_OK | os.X_OK):
        raise unusable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def unusable(path: Path, error: OSError, key: str = "training.output_dir") -> CheckpointError:
    """What the operating system said, for a person. key: the setting that decides where `path` is."""
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        in_the_way = next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), path)
        return CheckpointError(
            f"no folder can be made here: {in_the_way} is in the way",
            where=str(path),
            expected="a folder, or a name that is free",
            fix=f"remove or rename what is in the way, or choose another {key}",
        )
    return CheckpointError(
        f"cannot be written: {error.strerror or error}; {in_words(free_bytes(path))} free",
        where=str(path),
        expected="a folder that this user can write, on a disk with room",
        fix=f"make room or give the permission, or choose another {key}",
    )
