"""Kills of several processes at any moment: all end soon, and the resumed run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
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
    assert_all_end(started)
    return victim


def assert_all_end(started: list[tuple[ForkServerProcess, Connection]]) -> None:
    """Each is killed, or ends because another one is gone, or had ended before."""
    for process, answer in started:
        while not answer.poll(SECONDS_TO_END):
            raise AssertionError(f"process {process.pid} has not ended")
        try:
            error = answer.recv()
        except EOFError:
            continue  # killed, or ended by its heartbeat
        assert error is None or isinstance(error, LostError | PeerError), error
    for process, _ in started:
        process.join(SECONDS_TO_END)
        assert process.exitcode is not None, "it still lives"


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


ASYNC: dict[str, Any] = {"training.async_save": True}
SHARDED: dict[str, Any] = {"gpu.fsdp": True}
HYBRID: dict[str, Any] = {"gpu.fsdp": True, "gpu.shard_size": 2}
CHANGING: tuple[tuple[int, dict[str, Any]], ...] = ((2, {}), (2, SHARDED), (1, {}), (4, HYBRID), (2, {}), (3, SHARDED))
"""How many processes the same run has, one launch after the other, and how the model lies in them."""


@pytest.mark.parametrize(
    ("keys", "num"),
    [
        pytest.param({}, 1, id="few, replicated"),
        pytest.param({**SHARDED, **ASYNC}, 1, id="few, sharded, asynchronous"),
        pytest.param({}, 500, id="replicated", marks=pytest.mark.nightly),
        pytest.param(ASYNC, 250, id="replicated, asynchronous", marks=pytest.mark.nightly),
        pytest.param(SHARDED, 250, id="sharded", marks=pytest.mark.nightly),
        pytest.param({**SHARDED, **ASYNC}, 250, id="sharded, asynchronous", marks=pytest.mark.nightly),
    ],
)
def test_kills_of_several_processes(
    keys: dict[str, Any], num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch
) -> None:
    """Resumed by as many processes: bit for bit the unbroken run's."""
    num = int(os.environ.get("STROP_ATTACKS", num))
    keys = {**KEYS, **keys}
    config = runs.config(keys)
    in_processes(2, _train, config, None)  # the next one finds the reference in the store, as the others will
    shutil.rmtree(config.training.output_dir)
    started = time.monotonic()
    in_processes(2, _train, config, None)
    seconds = time.monotonic() - started
    unbroken, tally = runs.at(Path(config.training.output_dir) / "run"), Tally("kills of processes", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(keys)
        kills = rng.choice((1, 1, 2))
        for _ in range(kills):
            killed(2, config, rng, seconds)
        in_processes(2, _train, config, None)
        run = runs.at(Path(config.training.output_dir) / "run")
        assert runs.same_run(run, unbroken), seed
        assert_tidy(run.path)
        shutil.rmtree(config.training.output_dir)
        tally.add(f"the same after {kills}")
    tally.tell(num)


@few_or(250, few=1)
def test_kills_of_a_run_that_changes_its_processes(
    num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch
) -> None:
    """Each launch but the last is killed; the next has other processes, in which the model lies otherwise. The steps
    are those of the unbroken run, once each, and so are the weights, but for the order of sums."""
    in_processes(2, _train, config := runs.config({**KEYS, **MORE_STEPS}), None)
    unbroken = runs.at(Path(config.training.output_dir) / "run")
    tally = Tally("kills of changing processes", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config({**KEYS, **MORE_STEPS, **rng.choice(({}, ASYNC))})
        launches = CHANGING[:5] if seed == 0 else rng.sample(CHANGING, rng.randint(2, 5))
        for number, (size, keys) in enumerate(launches, 1):
            of_launch = config.with_values(keys, "the test")
            if number == len(launches):
                in_processes(size, _train, of_launch, None)
            else:
                kill_after_a_save(size, of_launch, rng)
        run = runs.at(Path(config.training.output_dir) / "run")
        assert run.steps() == unbroken.steps(), seed
        assert distance(unbroken.final, run.final) < 1e-6, seed
        assert_tidy(run.path)
        shutil.rmtree(config.training.output_dir)
        tally.add(f"{len(launches)} launches")
    tally.tell(num)


MORE_STEPS = {"training.max_steps": 8}


def kill_after_a_save(size: int, config: RunConfig, rng: random.Random) -> None:
    """Starts a run and kills one of its processes, or all, in a save after the first one that it makes itself."""
    run = Path(config.training.output_dir) / "run"
    before = newest_step(run)
    started = start_processes(size, _train, config, None)
    processes = [process for process, _ in started]
    until = time.monotonic() + SECONDS_TO_END
    while newest_step(run) == before and any(process.is_alive() for process in processes):
        assert time.monotonic() < until, "it saves nothing"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    for rank in rng.choice(([rng.randrange(size)], range(size))):
        _kill(processes[rank])
    assert_all_end(started)


def newest_step(run: Path) -> int:
    names = [path.parent.name for path in run.glob("checkpoint-*/MANIFEST.json")]
    return max((int(name.removeprefix("checkpoint-")) for name in names), default=0)


def assert_tidy(run: Path) -> None:
    """Nothing is left of what was being written, and nothing was damaged."""
    assert not [path.name for path in run.iterdir() if path.name.startswith((".tmp-", ".bad-"))]
