"""What a resume finds in a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from strop.config import FinetuningSection
from strop.engine.checkpoint import Checkpoint
from strop.engine.checkpoint_saves import Saves
from strop.engine.ending import Ending
from strop.engine.loop import Loop
from strop.engine.snapshot import Snapshot
from strop.engine.train_state import TrainState
from strop.errors import SaveError
from strop.resuming import look_for_best, steps_of
from strop.rundir import RunDir
from strop.world import World


class _Nothing:
    """A snapshot of a run without weights."""

    strategy = SimpleNamespace(own_share=lambda tensors: tensors)

    def take(self, state: TrainState) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return {}, {}


def test_a_run_does_not_come_back_to_a_best_model_that_is_gone(tmp_path: Path) -> None:
    """Not where a better one cannot be saved, either: it would be looked for after the last step."""

    def fails(*_: Any) -> Path:
        raise SaveError("the disk is full")

    world, state = World.alone("cpu"), TrainState(step=3, best_step=2, best_value=0.5)
    notes: list[str] = []
    saves = Saves(cast(Snapshot, _Nothing()), fails, notes.append, world, keeps_best=True, beside=False)
    saves.resumed(state)
    config = SimpleNamespace(finetuning=FinetuningSection(load_best_model_at_end=True))
    loop = cast(Loop, SimpleNamespace(state=state, config=config, world=world, saves=saves))
    look_for_best(loop, RunDir(tmp_path), Checkpoint(tmp_path / "checkpoint-3", 3, {}, {}, {}))
    assert state.best_step is None
    state.step, state.best_step, state.best_value = 4, 4, 0.4
    saves.save(state)
    assert "could not be saved" in notes[0] and state.best_step is None


def test_the_number_of_steps_of_an_older_run_is_in_its_result(tmp_path: Path) -> None:
    """Its manifest does not have it. Where it does, result.json may be of a longer course already."""
    ending = Ending("all 9 steps are done", False, 9, 9, 9, {}, None)
    (tmp_path / "result.json").write_text(json.dumps(ending.as_dict()))
    for written, found in ((None, 9), (6, 6)):
        done = Checkpoint(tmp_path / "final", 6, {"recipe": {}, "num_steps": written}, {}, {})
        assert steps_of(done, RunDir(tmp_path)) == found
