"""Kills at any moment, by time and by change to a file: the resumed run ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import strop
from smoke.attacks.trials import TRAINED, Tally, few_or, num_changes, outcome, posix, run_apart
from strop.data.read.sources import SPLIT_FILES
from strop.data.split_files import write_split_files
from strop.types import RowShape

pytestmark = posix


class Killer:
    """Kills copies that do a work: a share of them after a time, the others at a change to a file."""

    def __init__(self, unbroken: Callable[[], Any], set_up: Callable[[], Any], by_time: float = 0.5) -> None:
        """set_up: undoes what `unbroken` has done."""
        self._by_time = by_time
        self._changes = num_changes(unbroken)
        set_up()
        started = time.monotonic()
        assert run_apart(unbroken) == 0
        self._seconds = time.monotonic() - started
        set_up()

    def kill(self, work: Callable[[], Any], rng: random.Random) -> int:
        if rng.random() < self._by_time:
            return run_apart(work, after=rng.uniform(0, 1.1 * self._seconds))
        return run_apart(work, at_change=rng.randint(1, self._changes))


def killer_of_runs(runs: Any, keys: dict[str, Any] = TRAINED) -> Killer:
    config = runs.config(keys)
    return Killer(partial(strop.train, config), partial(shutil.rmtree, config.training.output_dir))


@pytest.mark.share(1)
@few_or(500, few=1)
@pytest.mark.parametrize("beside", [False, True], ids=["at once", "asynchronous"])
def test_kills(beside: bool, num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    keys = {**TRAINED, "training.async_save": beside}
    unbroken, tally = runs(TRAINED), Tally(f"kills of a run{', asynchronous saves' if beside else ''}", record_property)
    killer = killer_of_runs(runs, keys)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(keys)
        go_on = partial(strop.train, config, resume="auto")
        for _ in range(kills := rng.choice((1, 1, 2, 3))):
            killer.kill(go_on, rng)
        assert outcome(go_on) == "done", seed
        assert runs.same_run(runs.at(Path(config.training.output_dir) / "run"), unbroken), seed
        shutil.rmtree(config.training.output_dir)
        tally.add(f"the same after {kills}")
    tally.tell(num)


METHODS = ("sft", "dpo", "kto", "orpo", "simpo")


@pytest.mark.parametrize(
    ("method", "stride"),
    [("dpo", 60), *(pytest.param(method, 1, marks=pytest.mark.nightly) for method in METHODS)],
)
def test_killed_at_every_change_to_a_file(
    method: str, stride: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch
) -> None:
    """Of a whole run, one after the other; in the normal suite, every `stride`-th of them."""
    keys = {**TRAINED, "post_training.method": method, "training.max_steps": 2}
    unbroken, tally = runs(keys), Tally(f"kills of {method} at every change", record_property)
    config = runs.config(keys)
    changes = range(1, num_changes(partial(strop.train, config)) + 1, stride)
    for change in changes:
        shutil.rmtree(config.training.output_dir)
        code = run_apart(partial(strop.train, config), at_change=change)
        assert outcome(partial(strop.train, config, resume="auto")) == "done", change
        assert runs.same_run(runs.at(Path(config.training.output_dir) / "run"), unbroken), change
        tally.add("killed" if code else "done before")
    tally.tell(len(changes))


@few_or(200, few=1)
def test_kills_of_an_overwriting_run(num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    unbroken, other = runs(TRAINED), runs(TRAINED, learning_rate=3e-3)
    tally = Tally("kills of an overwriting run", record_property)
    killer = killer_of_runs(runs)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(TRAINED)
        folder = Path(config.training.output_dir) / "run"
        shutil.copytree(other.path, folder)
        for _ in range(rng.choice((1, 1, 2, 3))):
            overwrites = not _has_begun(folder, other.path)
            how = {"overwrite": True} if overwrites else {"resume": "auto"}
            killer.kill(partial(strop.train, config, **how), rng)
        took = outcome(partial(strop.train, config, resume="auto"))
        run = runs.at(folder)
        if took == "done":
            assert runs.same_run(run, unbroken), seed
        else:  # it died before it had said what it would do: the old run is whole, and is not taken for the new one
            assert took == "CheckpointError" and runs.same_run(run, other), (seed, took)
        shutil.rmtree(config.training.output_dir)
        tally.add("the new run" if took == "done" else "the old run, and it is said")
    tally.tell(num)


def _has_begun(folder: Path, old: Path) -> bool:
    file = folder / "config.yaml"
    return not file.exists() or file.read_bytes() != (old / "config.yaml").read_bytes()


@pytest.mark.share(1)
@few_or(150, few=1)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kills_in_the_export(
    lora: bool, num: int, record_property: Any, runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    keys = {**TRAINED, **({"lora.r": 4} if lora else {})}
    unbroken = runs(keys)
    whole = {file.name: file.read_bytes() for file in (unbroken.path / "final").iterdir()}
    trained = tmp_path / "trained"
    shutil.copytree(unbroken.path, trained)
    shutil.rmtree(trained / "final")
    tally = Tally(f"kills in the export ({'adapter' if lora else 'model'})", record_property)
    watched.setattr("strop.engine.gradients.forward_backward", None)  # no step is taken
    config = runs.config(keys)
    folder = Path(config.training.output_dir) / "run"

    def set_up() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained, folder)

    set_up()
    go_on = partial(strop.train, config, resume="auto")
    killer = Killer(go_on, set_up, by_time=0.2)
    for seed in range(num):
        rng = random.Random(seed)
        set_up()
        killer.kill(go_on, rng)
        if (final := folder / "final").exists():
            assert {file.name: file.read_bytes() for file in final.iterdir()} == whole, seed
        there = final.exists()
        assert outcome(go_on) == "done", seed
        assert {file.name: file.read_bytes() for file in final.iterdir()} == whole, seed
        assert runs.same_run(runs.at(folder), unbroken), seed
        assert not [path for path in folder.iterdir() if path.name.startswith(".tmp-")], seed
        tally.add("whole after the kill" if there else "taken again")
    tally.tell(num)


ANSWERS: dict[RowShape, Callable[[int], dict[str, Any]]] = {
    "single": lambda i: {"completion": "yes " * i},
    "pair": lambda i: {"chosen": "yes " * i, "rejected": "no"},
    "labelled": lambda i: {"completion": "yes " * i, "label": i % 2 == 0},
    "group": lambda i: {"completions": ["yes " * i, "no"], "rewards": [1.0, 0.0]},
}


@pytest.mark.share(2)
@few_or(150, few=8)
@pytest.mark.parametrize("shape", sorted(ANSWERS))
def test_kills_of_prepare(shape: RowShape, num: int, record_property: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", **ANSWERS[shape](i)} for i in range(1, 100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": 1}]))
    names = (*SPLIT_FILES[shape], "statistics.json", "rejected.jsonl")

    def prepare(folder: Path) -> None:
        write_split_files([str(tmp_path / "rows.jsonl")], folder, shape)

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}

    prepare(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert set(whole) == set(names)
    place = tmp_path / "place" / "data"
    killer = Killer(lambda: prepare(place), lambda: shutil.rmtree(place))
    tally = Tally(f"kills of prepare ({shape})", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        before = rng.choice(("new", "empty", "with another file"))
        if before != "new":
            place.mkdir(parents=True)
        if before == "with another file":
            (place / "notes.txt").write_text("mine")
        killer.kill(lambda: prepare(place), rng)
        there = {name: content for name, content in files(place).items() if name in names}
        assert there.items() <= whole.items(), seed  # no half a split, ever
        if before != "with another file":
            assert there in ({}, whole), seed
        if before == "with another file":
            assert (place / "notes.txt").read_text() == "mine", seed
        if there:
            assert outcome(lambda: prepare(place)) == "DataError", seed  # the files are there already
            for name in there:
                (place / name).unlink()
        assert outcome(lambda: prepare(place)) == "done", seed
        assert files(place).items() >= whole.items(), seed
        assert len(list(place.parent.iterdir())) == 1, seed
        shutil.rmtree(place.parent)
        tally.add(f"{'all' if there == whole else 'some' if there else 'no'} files, folder {before}")
    tally.tell(num)


SAMPLED: dict[str, Any] = {
    **TRAINED,
    "post_training.method": "grpo",
    "post_training.beta": 0.1,
    "rollout.num_generations": 2,
    "rollout.num_iterations": 2,
    "rollout.dynamic_sampling": True,
    "rewards": [
        {"name": "regex", "settings": {"pattern": "a"}},
        {"name": "length", "settings": {"max_length": 8, "cache": 8}},
    ],
    "training.max_completion_length": 8,
}
"""A run that samples; its steps come in pairs that train on the same completions."""


KILLS = 5
"""Of each run that samples."""


@few_or(200, few=4)
def test_kills_of_a_run_that_samples(num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    """While sampling, rewarding, training and saving: 20 kills in the suite, 1,000 by `make nightly`."""
    keys = {**SAMPLED, "dataset.train_file": str(runs.files["singles"])}
    unbroken, tally = runs(keys), Tally("kills of a run that samples", record_property)
    killer = Killer(
        partial(strop.train, config := runs.config(keys)), partial(shutil.rmtree, config.training.output_dir)
    )
    rollouts = _rollouts(unbroken.path)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(keys)
        go_on = partial(strop.train, config, resume="auto")
        for _ in range(KILLS):
            killer.kill(go_on, rng)
        assert outcome(go_on) == "done", seed
        folder = Path(config.training.output_dir) / "run"
        assert runs.same(runs.at(folder).final, unbroken.final), seed
        assert _rollouts(folder) == rollouts, seed
        shutil.rmtree(config.training.output_dir)
        tally.add(f"the same after {KILLS}")
    tally.tell(num)


def _rollouts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
