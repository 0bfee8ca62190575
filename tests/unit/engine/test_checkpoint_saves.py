"""A save that fails in one of several processes, at once and beside the training: all hear why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from processes import in_processes
from strop.config.sections import GpuSection
from strop.device import start_world
from strop.engine.checkpoint_saves import Saves
from strop.engine.train_state import TrainState
from strop.errors import DataError, PeerError
from strop.world import World


def _write(step: int, tensors: Any, state: Any, protect: Any, world: World) -> Path:
    if world.rank == 1:
        raise DataError("a bug in the writing")
    world.any(False)
    return Path("checkpoint")


def _saved(beside: bool) -> str:
    snapshot: Any = SimpleNamespace(take=lambda state: ({}, {}), strategy=SimpleNamespace(own_share=dict))
    try:
        with start_world(GpuSection()) as world, world.together():
            saves = Saves(snapshot, _write, print, world, keeps_best=False, beside=beside)
            saves.save(TrainState(step=3), last=True)
    except (DataError, PeerError) as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
def test_all_hear_why_a_save_failed_in_one(beside: bool) -> None:
    main, other = in_processes(2, _saved, beside)
    assert main == "process 1 of 2 failed: a bug in the writing"
    assert other == "process 0 says what is wrong: a bug in the writing"
