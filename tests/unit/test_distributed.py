"""A world of real processes: what they exchange, how they fail together, and which process this is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from processes import in_processes, start_processes
from strop import device, distributed, heartbeat
from strop.config.sections import GpuSection
from strop.device import pick_device, start_world
from strop.distributed import Place, buckets, find_place, is_restarted
from strop.errors import ConfigError, DataError, Interrupted, PeerError, StropError, foreign_errors
from strop.world import PeerMemoryError, World

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


@dataclass(frozen=True)
class Bag:
    words: str
    rows: dict[str, Tensor]


def _bag(rank: int) -> Bag:
    """Of another number of rows in every process; none in the first."""
    rows = {str(dtype): (torch.arange(3 * rank).view(rank, 3) % 2).to(dtype) for dtype in DTYPES}
    return Bag("word " * 200 * rank, {**rows, "scalar": torch.tensor(rank, dtype=torch.float64)})


def _exchanges() -> dict[str, Any]:
    with start_world(GpuSection()) as world:
        return {
            "world": (world.rank, world.size, world.is_main),
            "sum": world.sum([world.rank, 10**12]),
            "any": [world.any(world.rank == 1), world.any(False)],
            "main": world.on_main(lambda: "x" * 5000 + str(world.rank)),
            "short": world.gather(world.rank),
            "one long": world.gather("y" * 2000 if world.rank == 1 else ""),
            "bags": [
                (bag.words, {n: t.tolist() for n, t in bag.rows.items()}) for bag in world.gather(_bag(world.rank))
            ],
            "dtypes": [t.dtype for t in world.gather(_bag(world.rank))[2].rows.values()],
        }


def test_what_processes_exchange() -> None:
    results = in_processes(3, _exchanges)
    bags = [(bag.words, {n: t.tolist() for n, t in bag.rows.items()}) for bag in map(_bag, range(3))]
    for rank, found in enumerate(results):
        assert found == {
            "world": (rank, 3, rank == 0),
            "sum": [3, 3 * 10**12],
            "any": [True, False],
            "main": "x" * 5000 + "0",
            "short": [0, 1, 2],
            "one long": ["", "y" * 2000, ""],
            "bags": bags,
            "dtypes": [*DTYPES, torch.float64],
        }


def _tensors() -> list[list[float] | None]:
    with start_world(GpuSection()) as world:
        distributed.BUCKET_BYTES = 40
        some = [
            nn.Parameter(torch.zeros(n, dtype=d))
            for n, d in ((3, torch.float32), (2, torch.float64), (30, torch.float32))
        ]
        across, nowhere = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(1))
        for at, parameter in enumerate(some):
            if (at + world.rank) % 2:  # the others have none
                parameter.grad = torch.full_like(parameter, 10.0**world.rank + at)
        across.grad = torch.arange(6.0).view(3, 2).t() * (1 + world.rank)  # not contiguous
        world.sum_gradients([*some, across, nowhere])
        mine = torch.tensor([world.rank + 0.5])
        step = torch.tensor(float(world.rank))
        world.share_tensors([mine, step])
        own = [None if p.grad is None else p.grad.flatten().tolist() for p in (*some, across, nowhere)]
        return [*own, [*mine.tolist(), step.item()]]


def test_gradients_are_summed_and_tensors_are_those_of_rank_0() -> None:
    """Also a gradient that only one process has, one that lies in memory in another order, and one that none has."""
    expected = [[10.0] * 3, [2.0] * 2, [12.0] * 30, [0.0, 6.0, 12.0, 3.0, 9.0, 15.0], None, [0.5, 0.0]]
    assert in_processes(2, _tensors) == [expected, expected]


def _failures() -> list[str]:
    said = []
    with start_world(GpuSection()) as world:
        for failing in range(world.size):
            try:
                with world.together():
                    if world.rank == failing:
                        raise DataError(f"bad row {failing}", where="rows.jsonl:3")
                    world.any(False)
            except (DataError, PeerError) as error:
                said.append(f"{type(error).__name__}: {error!s}")
        try:
            if world.rank == 1:
                world.tell(MemoryError("no room"), memory=True)
            else:
                world.sum_gradients([nn.Parameter(torch.zeros(2))])
        except PeerMemoryError as error:
            said.append(str(error))
        said.append(str(world.sum([1])))  # and they go on
    return said


def test_what_fails_in_one_process_fails_in_all_and_rank_0_says_what() -> None:
    main, other = in_processes(2, _failures)
    assert main == [
        "DataError: rows.jsonl:3: bad row 0",
        "PeerError: process 1 of 2 failed: rows.jsonl:3: bad row 1",
        "in process 1: no room",
        "[2]",
    ]
    assert other == [
        "PeerError: process 0 of 2 failed: rows.jsonl:3: bad row 0",
        "PeerError: process 0 says what is wrong: rows.jsonl:3: bad row 1",
        "[2]",
    ]


def _nested(failing: Sequence[int]) -> str:
    try:
        with start_world(GpuSection()) as world, world.together(), foreign_errors(DataError), world.together():
            if world.rank in failing:
                raise ValueError("no such file")
            world.any(False)
    except (DataError, PeerError) as error:
        return f"{type(error).__name__}: {error!s}"
    return "nothing"


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)], ids=str)
def test_an_error_in_nested_blocks_is_told_once(failing: Sequence[int]) -> None:
    """Also if it has become another one in between. Told again, it would be lost: the others have left by then."""
    main, other = in_processes(2, _nested, failing)
    if 0 in failing:
        assert main == "DataError: no such file"
    else:
        assert main == "PeerError: process 1 of 2 failed: no such file"
    assert other.startswith("PeerError: process 0 ") and "no such file" in other


def _before_a_mesh(failing: int) -> str:
    try:
        with start_world(GpuSection()) as world, world.together():
            if world.rank == failing:
                raise DataError("no such file", where="model")
            world.mesh(None)
    except (DataError, PeerError) as error:
        return f"{type(error).__name__}: {error!s}"
    return "nothing"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_before_the_others_make_a_mesh_is_heard(failing: int) -> None:
    """Such as one that could not load the model; the groups of a mesh wait without end for those who are not there."""
    main, _ = in_processes(2, _before_a_mesh, failing)
    assert main == ("DataError: model: no such file", "PeerError: process 1 of 2 failed: model: no such file")[failing]


def _stopped_with_a_mesh(error: Exception, said: str) -> str:
    distributed.SECONDS_TO_TELL, heartbeat.BEAT_SECONDS = 0.3, 0.05
    try:
        with start_world(GpuSection()) as world, world.together():
            world.mesh(None)
            if world.is_main:
                world.doing(said)
                time.sleep(1.5)  # as it may close trackers
            raise error
    except (Interrupted, StropError) as stop:
        return type(stop).__name__


@pytest.mark.parametrize(
    ("error", "said", "ends"),
    [
        (Interrupted(3, "checkpoint-3"), "step 3", ["Interrupted", "Interrupted"]),
        (DataError("not finite"), heartbeat.ENDING, ["DataError", "PeerError"]),
    ],
    ids=["stopped", "failed"],
)
def test_processes_that_end_together_wait_for_the_one_that_ends_later(
    error: Exception, said: str, ends: list[str]
) -> None:
    assert in_processes(2, _stopped_with_a_mesh, error, said) == ends


def _unheard() -> str:
    distributed.SECONDS_TO_TELL, heartbeat.BEAT_SECONDS = 0.3, 0.05
    with start_world(GpuSection()) as world, world.together():
        world.mesh(None)
        if world.is_main:
            time.sleep(3)  # as in a collective call of a layer
            return "well"
        raise DataError("bad row")


def test_a_process_that_is_not_heard_ends_by_itself() -> None:
    (main, from_main), (other, _) = start_processes(2, _unheard)
    other.join(60)
    assert other.exitcode == 1 and main.exitcode is None
    assert from_main.poll(20)
    main.join(20)


def _broken(error: Exception) -> str:
    """What becomes of an error in a collective call of a process whose others still live."""
    said: list[str] = []

    def fails(*_: Any, **__: Any) -> None:
        raise error

    def ends(code: int) -> None:
        raise SystemExit(code)

    try:
        with start_world(GpuSection()) as world:
            world.any(False)
            if world.is_main:
                return "well"
            heartbeat.Heartbeat.gone = lambda self: ""  # type: ignore[method-assign]  # all give signs of life
            distributed.complain, distributed.os._exit = said.append, ends  # type: ignore[assignment]
            dist.all_gather = fails
            world.any(False)
    except (StropError, SystemExit) as end:
        return f"{type(end).__name__}: {''.join(said) or end!s}"
    return "nothing"


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (RuntimeError("NCCL error\nlong"), "LostError: process 1 has lost the others: NCCL error"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes\nlong"),
            "SystemExit: process 1 of 2 failed: memory ran out while it exchanged values with the others: "
            "DefaultCPUAllocator: can't allocate memory: 8 bytes",
        ),
    ],
)
def test_an_error_in_a_collective_call_is_no_death_of_another_process(error: Exception, becomes: str) -> None:
    main, other = in_processes(2, _broken, error)
    assert main == "well" and other.startswith(becomes)


def _beats_until(begun: Path, stop: Path) -> str:
    heartbeat.BEAT_SECONDS, heartbeat.LIMIT_SECONDS = 0.05, 2.0
    with start_world(GpuSection()) as world:
        world.any(False)
        (begun / str(world.rank)).touch()
        while not stop.exists():
            time.sleep(0.05)
        world.any(False)
    return "well"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system stops no processes")
def test_processes_that_all_stood_still_do_not_take_each_other_for_hung(tmp_path: Path) -> None:
    """As in a container that was paused: the first one that goes on has seen no beat for long."""
    started = start_processes(2, _beats_until, tmp_path, tmp_path / "stop")
    deadline = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    pids = [process.pid for process, _ in started if process.pid is not None]
    for pid in reversed(pids):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
    time.sleep(3)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)
    time.sleep(1)
    (tmp_path / "stop").touch()
    assert [here.recv() for _, here in started if here.poll(20)] == ["well", "well"]


@given(st.lists(st.tuples(st.sampled_from((torch.float32, torch.float64)), st.integers(0, 9))), st.integers(1, 60))
def test_buckets_hold_all_gradients_in_their_order(sizes: list[tuple[torch.dtype, int]], limit: int) -> None:
    gradients = [torch.zeros(n, dtype=dtype) for dtype, n in sizes]
    made = list(buckets(gradients, limit))
    assert [id(g) for bucket in made for g in bucket] == [id(g) for g in gradients]
    for bucket in made:
        assert len({g.dtype for g in bucket}) == 1
        assert len(bucket) == 1 or sum(g.nbytes for g in bucket) <= limit


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_the_place_is_what_torchrun_says() -> None:
    assert find_place({}) is None
    assert find_place(TORCHRUN) == Place(3, 4, 1, 2)
    assert find_place({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None, "a batch script, before any srun"
    assert find_place({**TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}) == Place(3, 4, 1, 2), "torchrun under srun"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "srun --ntasks-per-node=1 torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun has started 2 processes"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "torchrun --nnodes"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({**TORCHRUN, "RANK": "x"}, "RANK=x"),
        ({**TORCHRUN, "RANK": "4"}, "RANK below WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5"),
    ],
)
def test_other_launchers_and_bad_places_are_refused(told: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match="torchrun") as refused:
        find_place(told)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"}, False),
        (TORCHRUN, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "x"}, False),
    ],
    ids=str,
)
def test_a_restart_is_what_torchrun_says(told: dict[str, str], expected: bool) -> None:
    assert is_restarted(told) is expected


@pytest.mark.parametrize(
    ("gpu", "place", "expected"),
    [
        (GpuSection(), None, 0),
        (GpuSection(device_ids=[2]), None, 2),
        (GpuSection(), Place(1, 2, 1, 2), 1),
        (GpuSection(device_ids=[3, 1]), Place(1, 2, 1, 2), 1),
        (GpuSection(device_ids=[3, 1]), Place(2, 4, 0, 2), 3),
    ],
)
def test_each_process_takes_its_gpu(gpu: GpuSection, place: Place | None, expected: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(device, "num_gpus", lambda: 4)
    assert pick_device(gpu, place) == (torch.device("cuda", expected), [])


@pytest.mark.parametrize(
    ("gpus", "gpu", "place", "said"),
    [
        (2, GpuSection(device_ids=[0, 2]), Place(0, 2, 0, 2), "device 2 is not there"),
        (2, GpuSection(), Place(0, 3, 0, 3), "this machine has 2"),
        (4, GpuSection(device_ids=[0, 1]), Place(0, 3, 0, 3), "3 processes are started"),
        (0, GpuSection(num_processes=2), Place(0, 3, 0, 3), "3 processes are started"),
    ],
)
def test_processes_without_a_device_are_refused(
    gpus: int, gpu: GpuSection, place: Place, said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(device, "num_gpus", lambda: gpus)
    with pytest.raises(ConfigError, match=said):
        pick_device(gpu, place)


@pytest.mark.parametrize(
    ("gpus", "gpu", "expected"),
    [
        (0, GpuSection(), 1),
        (0, GpuSection(num_processes=3), 3),
        (0, GpuSection(device_ids=[0, 1], use_ddp=True), 1),
        (4, GpuSection(), 1),
        (4, GpuSection(use_ddp=True), 4),
        (4, GpuSection(device_ids=[0, 1]), 2),
        (4, GpuSection(num_processes=3), 3),
    ],
)
def test_how_many_processes_are_started(gpus: int, gpu: GpuSection, expected: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(device, "num_gpus", lambda: gpus)
    assert device.num_processes(gpu) == expected


def test_several_processes_are_not_one(monkeypatch: Any) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match="asks for 2 processes, and this is one"),
        start_world(GpuSection(num_processes=2)),
    ):
        pass


def test_one_process_meets_itself() -> None:
    world = World.alone(CPU)
    assert (world.sum([3]), world.any(True), world.on_main(lambda: 5), world.gather("x")) == ([3], True, 5, ["x"])
    with pytest.raises(DataError), world.together():
        raise DataError("bad row")


def test_a_process_that_is_alone_has_no_mesh() -> None:
    with pytest.raises(ConfigError, match="connects no processes of this run, which has 1"):
        World.alone("cpu").mesh(None)
