"""The file that `--output` names. Floor 7."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from strop.disk import refuse_in_the_way, unusable
from strop.durable import write_file
from strop.errors import CheckpointError


def check_target(target: Path) -> None:
    """Refuse, before anything is computed, a file that is there already or cannot be written.

    Raises:
        CheckpointError: it is, or cannot.
    """
    refuse_in_the_way(target.parent, "--output")
    if os.path.lexists(target):
        raise CheckpointError("it is there already", where=str(target), fix="choose another --output, or remove it")


def write_target(target: Path, content: bytes | Iterable[bytes]) -> None:
    """Write the file, whole or not at all; its folder is made.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, content)
    except OSError as error:
        raise unusable(target, error, "--output") from error
