"""What is said of a write that fails: the remedy is that of its cause."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from strop import durable
from strop.disk import remedy, unusable
from strop.engine import checkpoint_writer, final_model
from strop.errors import CheckpointError
from strop.rundir import RunDir

CAUSES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "quota",
    errno.EFBIG: "ulimit -f",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EROFS: "for writing",
    errno.EIO: "check the disk",
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "holds so many files",
    errno.ENAMETOOLONG: "shorter",
    errno.ELOOP: "links",
    errno.ENOENT: "bring the folder back",
    errno.ESTALE: "mount",
    errno.ENOTDIR: "in the way",
    errno.EEXIST: "in the way",
    errno.ENXIO: "what the system says",
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def of_path(folder: Path, fault: Exception) -> None:
    raise unusable(folder / "run", fault) if isinstance(fault, OSError) else CheckpointError("", fix=remedy(str(fault)))


def in_a_checkpoint(folder: Path, fault: Exception) -> None:
    checkpoint_writer.save(folder, 1, {"w": torch.ones(2)}, {}, keep=None)


def in_the_export(folder: Path, fault: Exception) -> None:
    def write(_: Path) -> None:
        raise fault

    with RunDir.open(folder / "run", resume=False, overwrite=False) as run:
        final_model.export(run, write, needed=1, step=1, num_steps=1, recipe={}, made_from={})


@pytest.mark.parametrize("number", CAUSES, ids=errno.errorcode.get)
@pytest.mark.parametrize("fails", [of_path, in_a_checkpoint, in_the_export])
def test_the_remedy_is_that_of_the_cause(
    fails: Callable[[Path, Exception], None], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = os.strerror(number)
    for fault in (OSError(number, said), Exception(f"I/O error: {said} (os error {number})")):

        def broken(fault: Exception, *_: Any) -> None:
            raise fault

        if fails is in_a_checkpoint:
            monkeypatch.setattr(durable, "write_all", partial(broken, fault))
            monkeypatch.setattr(checkpoint_writer, "write_tensor_files", partial(broken, fault))
        with pytest.raises(CheckpointError) as caught:
            fails(tmp_path, fault)
        message = str(caught.value)
        assert CAUSES[number] in (caught.value.fix or "")
        assert ("make room" in message) == (number in FULL)
        assert number in FULL or number == errno.ENXIO or " free" not in message.partition("expected")[0]
