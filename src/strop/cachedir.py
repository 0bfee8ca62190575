"""Where things are kept that can be made again: `$STROP_CACHE`, or `~/.cache/strop`. Floor 0.

It may be deleted at any time.
"""

from __future__ import annotations

import logging
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from strop.errors import ConfigError

log = logging.getLogger("strop")


def cache_root() -> Path:
    """`$STROP_CACHE`, or `~/.cache/strop`; it need not be there."""
    return Path(os.environ.get("STROP_CACHE") or "~/.cache/strop").expanduser()


def cache_folder(kind: str, *, must_keep: bool = False) -> Path:
    """The folder for things of this kind (`tokens`, `references`); one for this process alone, where that cannot be
    written.

    Raises:
        ConfigError: it cannot be written, and what is made must be kept.
    """
    path = cache_root() / kind
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        problem = error.strerror or str(error)
        if must_keep:
            raise cannot_keep(str(path), problem) from error
        return _own_folder(str(path), kind, problem)


def cannot_keep(path: str, problem: str) -> ConfigError:
    """The error where the cache cannot be written and has to be."""
    return ConfigError(
        f"it cannot be written ({problem})",
        where=path,
        fix="set STROP_CACHE to a folder that this user can write, on a disk with room",
    )


@lru_cache
def _own_folder(path: str, kind: str, problem: str) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="strop-")
    _KEPT.append(folder)
    log.warning("%s cannot be written (%s): %s are kept for this run only; set STROP_CACHE", path, problem, kind)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
