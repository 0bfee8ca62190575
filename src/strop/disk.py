"""What a disk has to say, for a person: how much is free, and why something cannot be written. Floor 0, stdlib only."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from strop.errors import CheckpointError, SaveError

_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room: the quota of this user is used up",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or use a file system that takes larger ones",
    errno.EACCES: "give this user the permission to write there",
    errno.EPERM: "give this user the permission to write there",
    errno.EROFS: "mount the file system for writing",
    errno.EIO: "check the disk, which reports a failure",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close what holds so many files open on this machine",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ELOOP: "remove the links that lead to each other",
    errno.ENOENT: "bring the folder back, which was removed or unmounted",
    errno.ESTALE: "mount the folder again",
    errno.ENOTDIR: "remove or rename what is in the way",
    errno.EEXIST: "remove or rename what is in the way",
}
"""What to do about a failure of the system, by its number."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: Path) -> int | None:
    """Bytes that a file at `path`, which need not exist, could take; None where the system does not say."""
    return _of_nearest(path, lambda folder: shutil.disk_usage(folder).free)


def device_of(path: Path) -> int | None:
    """Which disk a file at `path`, which need not exist, would lie on; None where the system does not say."""
    return _of_nearest(path, lambda folder: os.stat(folder).st_dev)


def _of_nearest(path: Path, ask: Callable[[Path], int]) -> int | None:
    """What the system answers for `path`, or for the nearest folder above it that it knows."""
    for folder in (path, *path.parents):
        try:
            return ask(folder)
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


def remedy(why: str) -> str:
    """What to do about a write that failed.

    Args:
        why: what the system or a library says, in the words of `os.strerror` or with Rust's "(os error N)" behind it.
    """
    number = _number_of(why)
    return "see what the system says of this path" if number is None else _REMEDIES[number]


def room(why: str, path: Path, needed: int | None = None) -> str:
    """How much is free on the disk of `path`, to be written after `why`; empty where room is not what is missing.

    Args:
        why: as `remedy` takes it.
        needed: bytes that were to be written, where that is known.
    """
    if _number_of(why) not in (None, *_FULL):
        return ""
    wanted = "" if needed is None else f" {in_words(needed)} needed,"
    return f";{wanted} {in_words(free_bytes(path))} free"


def _number_of(why: str) -> int | None:
    found = [n for n in _REMEDIES if os.strerror(n) in why or f"(os error {n})" in why]
    return max(found, key=lambda n: len(os.strerror(n)), default=None)  # some of these words begin others


ROOM_FOR_A_RUN = "make room, lower training.save_total_limit, or choose another training.output_dir; then --resume"


def ensure_space(path: Path, needed: int, fix: str = ROOM_FOR_A_RUN) -> None:
    """Refuse to begin what the disk of `path` has no room for.

    Args:
        needed: bytes.
        fix: what the user can do about it.

    Raises:
        SaveError: fewer than `needed` bytes are free.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise SaveError(
            f"the disk is too full: {in_words(needed)} needed, {in_words(free)} free",
            where=str(path),
            fix=fix,
        )


def refuse_in_the_way(path: Path, key: str = "training.output_dir") -> None:
    """Say, without making it, that a folder cannot be made because something else is there, or nobody may.

    Args:
        key: the setting that decides where `path` is.

    Raises:
        CheckpointError: it, or a folder that it would lie in, is no folder, or cannot be written.
    """
    nearest = next((p for p in (path, *path.parents) if os.path.lexists(p)), None)
    if nearest is not None and not nearest.is_dir():
        raise unusable(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), key)
    if nearest is not None and not os.access(nearest, os.W_OK | os.X_OK):
        raise unusable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), key)


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
    why = error.strerror or str(error)
    return CheckpointError(
        f"cannot be written: {why}{room(why, path)}",
        where=str(path),
        expected="a folder that this user can write, on a disk with room",
        fix=f"{remedy(why)}, or choose another {key}",
    )
