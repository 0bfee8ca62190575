"""A killed process, and a machine that loses power, cost at most the checkpoint being written."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strop import durable
from strop.engine.checkpoint import newest
from strop.engine.checkpoint_saves import Saves
from strop.engine.checkpoint_writer import save
from strop.engine.train_state import TrainState
from strop.world import World


def put(run_dir: Path, step: int, keep: int | None = 1) -> None:
    tensors = {"w": torch.full((60,), float(step)), "step": torch.tensor(step)}
    save(run_dir, step, tensors, {"step": step}, keep=keep)


def loaded(run_dir: Path) -> int | None:
    """The step that a resume would go on from, all of one piece."""
    durable.recover(run_dir)
    found = newest(run_dir)
    if found is None:
        return None
    tensors = {"w": torch.zeros(60), "step": torch.tensor(0)}
    found.load_into(tensors)
    assert torch.equal(tensors["w"], torch.full((60,), float(found.step)))
    assert int(tensors["step"]) == found.state["step"] == found.step
    return found.step


# ---- killed at every call


@pytest.mark.share(1)
@pytest.mark.parametrize("before", [[1], [1, 2], [2]], ids=["rotating", "rotating two", "replacing itself"])
def test_killed_at_every_call_of_a_save(tmp_path: Path, on_disk: Callable[..., Any], before: list[int]) -> None:
    """[2] saves step 2 over step 2, whose content is the same here: it must be there whatever happens."""
    target = 2 if before == [2] else 3
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        folder.mkdir()
        for step in before:
            put(folder, step, keep=None)
        disk = on_disk(at, None, lambda folder=folder: put(folder, target))
        found = loaded(folder)
        if not disk.dead:
            assert found == target
            break
        assert found in (before[-1], target)
        assert not [p for p in folder.iterdir() if not p.name.startswith("checkpoint-")]
        put(folder, target + 1)
        assert loaded(folder) == target + 1
    assert at > 15


# ---- power lost at every call


@dataclass
class Trace:
    """`os` for strop.durable that writes down what would reach a disk, and when it is sure to."""

    operations: list[tuple[Any, ...]] = field(default_factory=list)
    open_files: dict[int, Path] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        fd = os.open(path, flags, mode)
        self.open_files[fd] = Path(path)
        if flags & os.O_CREAT:
            self.operations.append(("create", Path(path)))
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)
        del self.open_files[fd]

    def write(self, fd: int, data: memoryview) -> int:
        self.operations.append(("write", self.open_files[fd], bytes(data)))
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        self.operations.append(("sync", self.open_files[fd]))

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self.operations.append(("mkdir", Path(path)))

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        self.operations.append(("rename", Path(source), Path(target)))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self.operations.append(("unlink", Path(path)))

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)
        self.operations.append(("rmdir", Path(path)))


Files = dict[Path, bytes | None]
"""What is on the disk: path -> content, None for a folder."""
LOST: tuple[Callable[[bytes], bytes | None], ...] = (
    lambda data: data,
    lambda data: None,  # not even the name
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: bytes(len(data)),
)
"""What may be left of a file that was written and not synced."""


def after_power_loss(start: Files, operations: list[tuple[Any, ...]]) -> Iterator[Files]:
    """Every disk that `operations` can leave: unsynced names appear or not, unsynced contents in five ways."""
    pending = [
        i for i, op in enumerate(operations) if op[0] != "sync" and op[0] != "write" and not _settled(operations, i)
    ]
    for undone in itertools.chain.from_iterable(itertools.combinations(pending, n) for n in range(len(pending) + 1)):
        for lose in LOST:
            files = _replay(start, operations, set(undone), lose)
            if files is not None:
                yield files


def _settled(operations: list[tuple[Any, ...]], index: int) -> bool:
    """Whether the folder of the name that operation `index` changes was synced later on, under whatever name."""
    folder = operations[index][-1].parent if operations[index][0] == "rename" else operations[index][1].parent
    for op in operations[index + 1 :]:
        if op[0] == "sync" and op[1] == folder:
            return True
        if op[0] == "rename" and op[1] == folder:
            folder = op[2]
    return False


def _replay(
    start: Files, operations: list[tuple[Any, ...]], undone: set[int], lose: Callable[[bytes], bytes | None]
) -> Files | None:
    """The disk after all operations but `undone`; null where that cannot be."""
    files, unsynced = dict(start), set[Path]()
    for i, op in enumerate(operations):
        kind, path = op[0], op[1]
        if i in undone:
            continue
        if kind == "create":
            if path.parent not in files:
                return None
            files[path] = b""
            unsynced.add(path)
        elif kind == "write":
            if path in files:
                files[path] = (files[path] or b"") + op[2]
        elif kind == "sync":
            unsynced.discard(path)
        elif kind == "mkdir":
            files[path] = None
        elif kind == "rename":
            target = op[2]
            if path not in files or target in files:
                return None
            moved = {p: p if not p.is_relative_to(path) else target / p.relative_to(path) for p in files}
            files = {moved[p]: content for p, content in files.items()}
            unsynced = {moved.get(p, p) for p in unsynced}
        else:
            if path not in files or any(p.parent == path for p in files):
                return None
            del files[path]
    for path in unsynced & files.keys():
        content = lose(files[path] or b"")
        if content is None:
            del files[path]
        else:
            files[path] = content
    return files


def put_on_disk(files: Files, home: Path, folder: Path) -> None:
    for path, content in sorted(files.items()):
        place = folder / path.relative_to(home)
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


def power_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int], target: int
) -> list[tuple[bool, Files]]:
    """Every disk that a power loss during a save can leave, and whether the save had returned."""
    home = tmp_path / "run"
    home.mkdir()
    for step in before:
        put(home, step, keep=None)
    start: Files = {home: None, **{p: p.read_bytes() if p.is_file() else None for p in home.rglob("*")}}
    trace = Trace()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", trace)
        put(home, target)
    operations = trace.operations
    states = {
        (n == len(operations), tuple(sorted(files.items(), key=lambda item: str(item[0]))))
        for n in range(len(operations) + 1)
        for files in after_power_loss(start, operations[:n])
    }
    return [(returned, dict(files)) for returned, files in sorted(states, key=str)]


def check_power_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int], most: int | None) -> None:
    target = 2 if before == [2] else 3
    states = power_losses(tmp_path, monkeypatch, before, target)
    assert len(states) > 30
    if most is not None and len(states) > most:
        states = random.Random(0).sample(states, most)
    for i, (returned, files) in enumerate(states):
        folder = tmp_path / f"after-{i}"
        put_on_disk(files, tmp_path / "run", folder)
        found = loaded(folder)
        assert found == target if returned else found in (before[-1], target), f"state {i}: {sorted(map(str, files))}"


@pytest.mark.parametrize("before", [[1], [2]], ids=["rotating", "replacing itself"])
def test_power_lost_at_any_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int]) -> None:
    check_power_losses(tmp_path, monkeypatch, before, 400)


@pytest.mark.nightly
@pytest.mark.parametrize("before", [[1], [1, 2], [2]])
def test_power_lost_at_every_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int]
) -> None:
    check_power_losses(tmp_path, monkeypatch, before, None)


# ---- killed for real


Put = Callable[[int], None]
"""Saves a step."""


def at_once(run_dir: Path) -> Put:
    def put_at_once(step: int) -> None:
        put(run_dir, step, keep=2)
        (run_dir / "acknowledged").write_text(f"{step} ")

    return put_at_once


def beside(run_dir: Path) -> Put:
    """As a run does with `training.async_save`; a save is acknowledged when the next one has waited for it."""
    weight, state = torch.zeros(60), TrainState()
    snapshot: Any = SimpleNamespace(
        take=lambda state: ({"w": weight, "step": torch.tensor(state.step)}, {"step": state.step}),
        strategy=SimpleNamespace(own_share=dict),
    )

    def write(step: int, tensors: Any, state: Any, protect: Any, world: World) -> Path:
        return save(run_dir, step, tensors, state, keep=2, world=world)

    saves = Saves(snapshot, write, print, World.alone("cpu"), keeps_best=False, beside=True)

    def put_beside(step: int) -> None:
        state.step = step
        weight.fill_(step)
        saves.save(state)
        weight.fill_(-1)  # as the next step does while it is written
        if step > 1:
            (run_dir / "acknowledged").write_text(f"{step - 1} ")

    return put_beside


def kill_at_random(run_dir: Path, draw: random.Random, seconds: float, make: Callable[[Path], Put]) -> None:
    """A child that saves without end, killed; it acknowledges every save that is on the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # fork beside other tests' threads, which the child leaves alone
        child = os.fork()
    if child == 0:
        try:
            first, saving = loaded(run_dir) or 0, make(run_dir)
            for step in itertools.count(first + 1):
                saving(step)
        finally:
            os._exit(1)
    time.sleep(seconds * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def check_kills(run_dir: Path, times: int, seconds: float, make: Callable[[Path], Put]) -> None:
    draw = random.Random(0)
    acknowledged = 0
    for _ in range(times):
        kill_at_random(run_dir, draw, seconds, make)
        found = loaded(run_dir) or 0
        if (run_dir / "acknowledged").exists() and (text := (run_dir / "acknowledged").read_text()).endswith(" "):
            acknowledged = max(acknowledged, int(text))
        assert found >= acknowledged
        assert not list(run_dir.glob(".bad-*"))
    assert found > times / 4


HOW = pytest.mark.parametrize("make", [at_once, beside])


@pytest.mark.nightly
@HOW
def test_killed_at_random(make: Callable[[Path], Put], tmp_path: Path) -> None:
    check_kills(tmp_path, 20, 0.15, make)


@HOW
@pytest.mark.nightly
def test_killed_at_random_a_thousand_times(make: Callable[[Path], Put], tmp_path: Path) -> None:
    check_kills(tmp_path, 1000, 0.15, make)
