"""Every file of a run and of both caches, damaged: the same result, or one message."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import strop
from smoke.attacks.trials import TRAINED, Tally, damage, few_or, outcome


@few_or(500)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_damages(
    finished: bool, num: int, record_property: Any, runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    unbroken = runs(TRAINED)
    shutil.rmtree(tmp_path / "cache")
    config = runs.config(TRAINED)
    (done,) = strop.train(config)
    if not finished:
        shutil.rmtree(done.final)
        shutil.rmtree(done.run_dir / "checkpoint-4")
    places = {done.run_dir: tmp_path / "kept-run", tmp_path / "cache": tmp_path / "kept-cache"}
    for place, kept in places.items():
        shutil.copytree(place, kept)
    files = sorted(path for place in places for path in place.rglob("*") if path.is_file())
    tally = Tally(f"damages of a{' finished' if finished else 'n unfinished'} run and its caches", record_property)
    touched = set()
    for seed in range(num):
        rng = random.Random(seed)
        for place, kept in places.items():
            shutil.rmtree(place)
            shutil.copytree(kept, place)
        # every file in turn; a few trials draw
        file = files[seed % len(files)] if num >= len(files) else rng.choice(files)
        how = damage(file, rng)
        touched.add(file)
        took = outcome(partial(strop.train, config, resume="auto"))
        if took == "done":
            assert runs.same(runs.at(done.run_dir).final, unbroken.final), (seed, file, how)
        tally.add(f"{how}: {took}")
    tally.tell(num, files=len(touched))
