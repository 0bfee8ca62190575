"""Kills of several processes at any moment: all end soon, and the resumed run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import strop
from processes import in_processes, start_processes
from smoke.attacks.trials import TRAINED, Tally, few_or, posix, watch_changes
from strop import RunConfig, heartbeat
from strop.errors import LostError, PeerError

pytestmark = posix

KEYS = {
    **TRAINED,
    "training.micro_batch_tokens": 64,
    "training.groups_per_step": 4,
    "training.learning_rate": 1e-3,
}
SECONDS_TO_END = 60
MOST_CHANGES = 160
"""Changes to files that rank 0 makes in such a run are fewer; a victim that makes fewer ends as the run does."""


class Doomed(NamedTuple):
    """A process that dies in its change to files of this number."""

    rank: int
    at_change: int


def _train(config: RunConfig, doomed: Doomed | None) -> None:
    heartbeat.BEAT_SECONDS, heartbeat.GONE_SECONDS = 0.1, 0.4  # the others notice soon
    if doomed is not None and os.environ["RANK"] == str(doomed.rank):
        watch_changes(doomed.at_change)
    strop.train(config, resume="auto")


def killed(size: int, config: RunConfig, rng: random.Random, seconds: float) -> str:
    """Starts a run and kills processes of it: one or all after a time, or rank 0 in a change to a file. All have ended
    after that. Returns what was killed."""
    victim = rng.choice(("rank 0", "rank 0", "one", "all"))
    at_change = victim == "rank 0" and rng.random() < 0.8
    doomed = Doomed(0, rng.randint(1, MOST_CHANGES)) if at_change else None
    started = start_processes(size, _train, config, doomed)
    processes = [process for process, _ in started]
    if not at_change:
        time.sleep(rng.uniform(0, 1.1 * seconds))
        ranks = {"rank 0": [0], "one": [rng.randrange(1, size)], "all": range(size)}[victim]
        for rank in ranks:
            _kill(processes[rank])
    for process, answer in started:
        while not answer.poll(SECONDS_TO_END):
            raise AssertionError(f"process {process.pid} has not ended")
        try:
            error = answer.recv()
        except EOFError:
            continue  # killed, or ended by its heartbeat
        assert error is None or isinstance(error, LostError | PeerError), error
    for process in processes:
        process.join(SECONDS_TO_END)
        assert process.exitcode is not None, "it still lives"
    return victim


def _kill(process: ForkServerProcess) -> None:
    assert process.pid is not None
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the run was faster


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest relative distance of a weight."""
    assert one.keys() == two.keys()
    return max(float((two[name] - weight).norm() / weight.norm()) for name, weight in one.items())


@few_or(1000, few=3)
def test_kills_of_several_processes(num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    """Resumed by as many processes: bit for bit the unbroken run's; by another number: its steps, once each."""
    config = runs.config(KEYS)
    started = time.monotonic()
    in_processes(2, _train, config, None)
    seconds = time.monotonic() - started
    unbroken, tally = runs.at(Path(config.training.output_dir) / "run"), Tally("kills of processes", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(KEYS)
        sizes = (2,) if seed % 2 else (1, 2, 3)
        kills = rng.choice((1, 1, 2))
        for _ in range(kills):
            killed(2, config, rng, seconds)
        size = rng.choice(sizes)
        in_processes(size, _train, config, None)
        run = runs.at(Path(config.training.output_dir) / "run")
        assert run.steps() == unbroken.steps(), seed
        if size == 2:
            assert runs.same_run(run, unbroken), seed
        else:
            assert distance(unbroken.final, run.final) < 1e-6, seed
        assert not [path for path in run.path.iterdir() if path.name.startswith(".tmp-")], seed
        shutil.rmtree(config.training.output_dir)
        tally.add(f"killed {kills} times, then {size} processes")
    tally.tell(num)
