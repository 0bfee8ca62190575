"""Kills of several processes at any moment: all end soon, and the resumed run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
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
MOST_CALLS = {False: 100, True: 220}
"""Collective calls that each process makes in such a run, sharded or not, are about as many."""
COLLECTIVE = ("all_reduce", "all_gather", "broadcast", "all_gather_single", "reduce_scatter_single")
"""Those of torch.distributed that a run makes, the ones of FSDP among them."""


class AtChange(NamedTuple):
    """Rank 0 dies in its change to files of this number."""

    number: int
    rank: int = 0

    def watch(self) -> None:
        watch_changes(self.number)


class AtCall(NamedTuple):
    """A process dies before, in or after its collective call of this number."""

    number: int
    rank: int
    when: str

    def watch(self) -> None:
        count = 0

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count != self.number:
                    return call(*arguments, **named)
                if self.when != "before":
                    call(*arguments, **{**named, "async_op": self.when == "in"})
                os.kill(os.getpid(), signal.SIGKILL)

            return counted

        for name in COLLECTIVE:
            setattr(dist, name, watched(getattr(dist, name)))


def _train(config: RunConfig, doomed: AtChange | AtCall | None) -> None:
    heartbeat.BEAT_SECONDS, heartbeat.GONE_SECONDS, heartbeat.BEGIN_SECONDS = 0.1, 0.4, 8.0  # the others notice soon
    if doomed is not None and os.environ["RANK"] == str(doomed.rank):
        doomed.watch()
    strop.train(config, resume="auto")


VICTIMS = ("rank 0 in a change", "one in a call", "one", "all")


def killed(size: int, config: RunConfig, rng: random.Random, seconds: float, victims: Sequence[str] = VICTIMS) -> str:
    """Starts a run and kills processes of it: one or all after a time, rank 0 in a change to a file, or any of them
    before, in or after a collective call. All have ended after that. Returns what was killed."""
    victim = rng.choice(victims)
    doomed: AtChange | AtCall | None = None
    if victim == "rank 0 in a change":
        doomed = AtChange(rng.randint(1, MOST_CHANGES))
    elif victim == "one in a call":
        most = MOST_CALLS[config.gpu.fsdp]
        doomed = AtCall(rng.randint(1, most), rng.randrange(size), rng.choice(("before", "in", "after")))
    started = start_processes(size, _train, config, doomed)
    processes = [process for process, _ in started]
    if doomed is None:
        time.sleep(rng.uniform(0, 1.1 * seconds))
        for rank in range(size) if victim == "all" else [rng.randrange(size)]:
            _kill(processes[rank])
    assert_all_end(started)
    return f"{victim}: {doomed.when}" if isinstance(doomed, AtCall) else victim


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
    ("keys", "num", "victims"),
    [
        pytest.param({**SHARDED, **ASYNC}, 1, ("rank 0 in a change", "all"), id="few, sharded, asynchronous"),
        pytest.param({}, 500, VICTIMS, id="replicated", marks=pytest.mark.nightly),
        pytest.param(ASYNC, 250, VICTIMS, id="replicated, asynchronous", marks=pytest.mark.nightly),
        pytest.param(SHARDED, 250, VICTIMS, id="sharded", marks=pytest.mark.nightly),
        pytest.param({**SHARDED, **ASYNC}, 250, VICTIMS, id="sharded, asynchronous", marks=pytest.mark.nightly),
    ],
)
def test_kills_of_several_processes(
    keys: dict[str, Any],
    num: int,
    victims: tuple[str, ...],
    record_property: Any,
    runs: Any,
    watched: pytest.MonkeyPatch,
) -> None:
    """Resumed by as many processes: bit for bit the unbroken run's. In the suite, sharded; one of replicated processes
    is killed by `test_processes.py::test_whatever_is_killed_the_same_command_goes_on`."""
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
        kills = [killed(2, config, rng, seconds, victims) for _ in range(rng.choice((1, 1, 2)))]
        in_processes(2, _train, config, None)
        run = runs.at(Path(config.training.output_dir) / "run")
        assert runs.same_run(run, unbroken), seed
        assert_tidy(run.path)
        shutil.rmtree(config.training.output_dir)
        tally.add(f"the same after {', '.join(sorted(kills))}")
    tally.tell(num)


@pytest.mark.nightly
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
