"""`training.async_save`: checkpoints are written beside the training, and everything is as if they were not."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from processes import in_processes
from same_runs import CUT, LORA, in_many
from strop import RunConfig
from strop.engine import checkpoint_writer
from strop.engine.checkpoint_saves import HostCopies
from strop.engine.loop import Loop
from strop.errors import Interrupted, SaveError, StropError, TrainingError

OFTEN = {"training.save_steps": 1, "training.save_total_limit": None}
ASYNC = {"training.async_save": True}
PATIENCE = 60.0
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

Write = Callable[..., Any]


def contents(run: Path) -> dict[str, Any]:
    """What the checkpoints of a run hold, without what tells the time."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("checkpoint-*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.name == "state.json":
            found[name] = json.loads(path.read_text())
            del found[name]["train"]["seconds"]
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            found[name] = json.loads(content[8:start]), content[start:]  # safetensors orders metadata by chance
    return found


@pytest.mark.nightly
def test_the_same_bytes_as_a_save_at_once(runs: Any) -> None:
    one, two = runs({**OFTEN, **LORA}), runs({**OFTEN, **LORA, **ASYNC})
    assert two.checkpoints == [1, 2, 3, 4] and contents(one.path) == contents(two.path)
    assert runs.same_run(one, two)


@pytest.mark.nightly
@pytest.mark.parametrize("gpu", [{}, {"gpu.fsdp": True}], ids=["replicated", "sharded"])
def test_the_same_bytes_of_several_processes(gpu: dict[str, Any], runs: Any) -> None:
    """Sharded: each process writes its own part, in a thread of its own."""
    one, two = (in_many(2, runs.config({**OFTEN, **CUT, **gpu, **more})) for more in ({}, ASYNC))
    assert runs.at(two).checkpoints == [1, 2, 3, 4] and contents(one) == contents(two)


@pytest.fixture
def writing(watched: pytest.MonkeyPatch) -> Callable[[Write], None]:
    """writing(write): puts a function around the writing of tensors: it gets the function, and its arguments."""
    real = checkpoint_writer.write_tensor_files
    return lambda write: watched.setattr(checkpoint_writer, "write_tensor_files", lambda *all_: write(real, *all_))


@pytest.fixture
def steps(watched: pytest.MonkeyPatch) -> list[int]:
    """The steps that were begun."""
    begun: list[int] = []
    step = Loop.step

    def noted(self: Loop, number: int) -> None:
        begun.append(number)
        step(self, number)

    watched.setattr(Loop, "step", noted)
    return begun


def wait_for(what: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while not what() and time.monotonic() < until:
        time.sleep(0.005)
    return what()


def test_steps_go_on_while_a_checkpoint_is_written(
    writing: Callable[[Write], None], steps: list[int], runs: Any, capsys: Any
) -> None:
    """Step 3 begins while the checkpoint of step 2 is written; the save of step 4 waits for it, and that is told."""
    seen: list[tuple[list[int], list[str]]] = []
    told: list[str] = []

    def slow(real: Write, folder: Path, *rest: Any) -> Any:
        def waits() -> bool:
            told.append(capsys.readouterr().err)
            return "step 4: its save waits until the checkpoint of step 2 is written" in "".join(told)

        assert seen or wait_for(waits)
        found = real(folder, *rest)
        seen.append((list(steps), sorted(path.name for path in folder.parent.glob("checkpoint-*"))))
        return found

    writing(slow)
    run = runs({**OFTEN, **ASYNC, "training.save_steps": 2, "training.max_steps": 5})
    assert run.checkpoints == [2, 4, 5]
    assert seen[0] == ([1, 2, 3, 4], []), "what is being written has no name yet"
    assert [names for _, names in seen[1:]] == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]


@pytest.mark.nightly
def test_a_stop_waits_for_what_is_being_written(writing: Callable[[Write], None], runs: Any) -> None:
    """Both checkpoints are whole, and a resume ends as the unbroken run does."""
    unbroken, config = runs({**OFTEN, "training.save_steps": 1}), runs.config({**OFTEN, **ASYNC})

    def slow(real: Write, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return real(*rest)

    writing(slow)
    with pytest.raises(Interrupted) as stopped:
        strop.train(config)
    saved = stopped.value.step
    run = runs.at(Path(stopped.value.checkpoint).parent)
    assert run.checkpoints == list(range(1, saved + 1)) and saved in (1, 2)
    writing(lambda real, *rest: real(*rest))
    strop.train(config, resume="auto")
    assert runs.same_run(run, unbroken)


SOME_FAIL = [pytest.param(numbers, marks=pytest.mark.nightly) for numbers in ({1}, {2, 3}, {4})]


@pytest.mark.nightly
@pytest.mark.parametrize("numbers", [{1, 4}, {1, 2, 3, 4}, *SOME_FAIL], ids=str)
def test_a_save_that_fails_is_that_of_a_run_that_saves_at_once(
    numbers: set[int], writing: Callable[[Write], None], runs: Any, capsys: Any
) -> None:
    """The same checkpoints stay, the same model is the best one, and the same steps are told."""
    keys = {**OFTEN, "training.eval_steps": 1, "finetuning.load_best_model_at_end": True}
    ends = []
    for more in ({}, ASYNC):
        count = 0

        def failing(real: Write, *rest: Any) -> Any:
            nonlocal count
            count += 1
            if count in numbers:
                raise FULL
            return real(*rest)

        writing(failing)
        run = runs({**keys, **more})
        told = capsys.readouterr().err
        assert count == 4 and all(f"step {n} could not be saved, the run goes on" in told for n in numbers)
        assert run.checkpoints == [n for n in (1, 2, 3, 4) if n not in numbers]
        ends.append((run.untimed, run.final, json.loads((run.path / "result.json").read_text())["final_step"]))
    (lines, final, step), (other_lines, other_final, other_step) = ends
    assert lines == other_lines and runs.same(final, other_final) and step == other_step


def test_a_stop_whose_save_fails_is_an_error(writing: Callable[[Write], None], runs: Any) -> None:
    def fails(real: Write, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise FULL

    writing(fails)
    with pytest.raises(SaveError, match=r"checkpoint-\d: the checkpoint could not be written"):
        strop.train(runs.config({**OFTEN, **ASYNC}))


def test_a_run_that_fails_still_publishes(writing: Callable[[Write], None], runs: Any, watched: Any) -> None:
    """The checkpoint that was being written when a later step failed is on the disk afterwards."""
    config = runs.config({**OFTEN, **ASYNC})
    begun = threading.Event()

    def slow(real: Write, *rest: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        return real(*rest)

    step = Loop.step

    def fails(self: Loop, number: int) -> None:
        if number == 2:
            assert begun.wait(PATIENCE)
            raise TrainingError("this step must not be taken")
        step(self, number)

    writing(slow)
    watched.setattr(Loop, "step", fails)
    with pytest.raises(TrainingError, match="must not be taken"):
        strop.train(config)
    assert runs.at(Path(config.training.output_dir) / "run").checkpoints == [1]


def _fails_in_a_thread(config: RunConfig) -> tuple[str, str]:
    """The second process cannot write its part, for a reason that is none of the disk's."""
    real = checkpoint_writer.write_tensor_files

    def fails(folder: Path, *rest: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise MemoryError("no memory to write with")
        return real(folder, *rest)

    checkpoint_writer.write_tensor_files = fails
    try:
        strop.train(config)
    except StropError as error:
        return type(error).__name__, str(error)
    return "", "trained"


@pytest.mark.nightly
def test_a_thread_that_fails_ends_all_processes_with_its_message(runs: Any) -> None:
    first, second = in_processes(2, _fails_in_a_thread, runs.config({**OFTEN, **CUT, **ASYNC}))
    assert first[0] == "PeerError" and first[1].startswith("process 1 of 2 failed: ")
    assert "no memory to write with" in first[1] and "no memory to write with" in second[1]


def test_copies_are_apart_and_use_the_same_memory_again() -> None:
    weights = {"rows": torch.arange(6.0).view(2, 3).t(), "step": torch.tensor(1)}
    copies = HostCopies()
    first = copies.of(weights)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    weights["rows"].zero_()
    assert torch.equal(first["rows"], torch.arange(6.0).view(2, 3).t()) and first["rows"].is_contiguous()
    second = copies.of(weights)
    assert not second["rows"].any() and {name: tensor.data_ptr() for name, tensor in second.items()} == places
