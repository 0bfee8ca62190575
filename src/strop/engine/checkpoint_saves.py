"""Saves the checkpoints of a run: at once, or beside the training (`training.async_save`). Floor 3.

At once: a save returns when the checkpoint is on the disk. Beside the training: it returns when everything that the
checkpoint will hold has been copied to host memory. Then a thread of each process writes the copies, and rank 0
publishes the checkpoint when all processes have written theirs (checkpoint_writer.py; both ways leave the same bytes).

One checkpoint is written at a time. Whatever must know whether it is on the disk waits for it (`settle`): the next
save, the choice of the best model, a stop, the end of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from strop.engine.checkpoint import ignore_single_process_warning
from strop.engine.checkpoint_writer import local_part
from strop.engine.snapshot import Snapshot
from strop.engine.train_state import TrainState
from strop.errors import PeerError, SaveError
from strop.world import World

Best = tuple[int | None, float | None]
"""The step of the best evaluation so far, and its value."""


class Write(Protocol):
    """Writes and publishes a checkpoint, together with the other processes."""

    def __call__(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], protect: Sequence[int], world: World
    ) -> Path:
        """Raises SaveError in all processes if the disk of one does not take it."""


@dataclass(frozen=True)
class _Pending:
    """A save that has begun. best: as the checkpoint has it. written: its path, once it is on the disk."""

    step: int
    best: Best
    written: Future[Path]


class Saves:
    """The saves of one run, of which all processes make the same ones.

    Args:
        write: writes a checkpoint; called in a thread if `beside`.
        note: tells the user.
        keeps_best: the checkpoint of the best evaluation is kept, because its weights are wanted at the end.
        beside: write beside the training.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        write: Write,
        note: Callable[[str], None],
        world: World,
        *,
        keeps_best: bool,
        beside: bool,
    ) -> None:
        self._snapshot, self._write, self._note, self._world = snapshot, write, note, world
        self._keeps_best = keeps_best
        self._copies = HostCopies() if beside else None
        self._executor: Executor = ThreadPoolExecutor(1, "strop-save") if beside else _AtOnce()
        self._writers = world.beside() if beside else world
        self._pending: _Pending | None = None
        self._kept_best: Best = (None, None)
        self._has_waited = False

    def save(self, state: TrainState, *, must: bool = False, last: bool = False) -> Path | None:
        """Saves the run as it is now.

        If the disk does not take it, the run goes on: the next save may work, and after the last step there is still
        the final model. If this step was the best, that is forgotten, because its weights could not be loaded.

        Args:
            must: the run stops here: wait until it is on the disk, and raise the error if it is not.
            last: the run ends here: wait until it is on the disk. The weights of this step are in memory.

        Returns:
            The path of the checkpoint; None if it could not be saved, or is still being written.

        Raises:
            SaveError: `must`, and the disk did not take it.
            CheckpointError: a tensor of this or of the last save holds NaN or an infinity.
        """
        self._tell_waiting(state.step)
        self.settle(state)
        self._world.doing(f"saving step {state.step}")
        tensors, numbers = self._snapshot.take(state)
        own = self._snapshot.strategy.own_share(tensors)
        if self._copies is not None:
            own, numbers = self._copies.of(own), copy.deepcopy(numbers)
            ignore_single_process_warning()  # here, because filters of warnings belong to all threads
            self._world.any(False)  # a process that could not copy comes to `tell` instead, and no thread starts
        protect = [state.best_step] if state.best_step and self._keeps_best else []
        written = self._executor.submit(self._write_agreed, state.step, own, numbers, protect)
        self._pending = _Pending(state.step, (state.best_step, state.best_value), written)
        return self.settle(state, must=must, last=last) if self._copies is None or must or last else None

    def settle(self, state: TrainState, *, must: bool = False, last: bool = False) -> Path | None:
        """Waits for the save that has begun, if there is one; see `save`. Afterwards `state` names a best step only if
        its checkpoint is on the disk (or, with `last`, its weights are in memory)."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            path = pending.written.result()
        except SaveError as error:
            if must:
                raise
            self._note(f"warning: step {pending.step} could not be saved, the run goes on: {error}")
            if self._keeps_best and not last and state.best_step == pending.step:
                state.best_step, state.best_value = self._kept_best
            return None
        except PeerError:
            if self._writers is not self._world:  # so far only a thread has told it; its process tells it, too
                self._world.any(False)
            raise
        self._kept_best = pending.best
        return path

    def resumed(self, state: TrainState) -> None:
        """The run continues from a checkpoint with this state."""
        self._kept_best = (state.best_step, state.best_value)

    def close(self) -> None:
        """Waits for a save that has begun, when the run has failed. Its own failure is only told."""
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.written.exception()) is not None:
            self._note(f"warning: step {pending.step} could not be saved: {error}")
        self._executor.shutdown()

    def _write_agreed(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], protect: Sequence[int]
    ) -> Path:
        try:
            return self._write(step, tensors, state, protect, self._writers)
        except (SaveError, PeerError):
            raise  # in all processes
        except BaseException as error:
            if self._writers is not self._world:  # nobody else can tell the threads of the other processes
                self._writers.tell(error)
            raise

    def _tell_waiting(self, step: int) -> None:
        pending = self._pending
        if pending is not None and not pending.written.done() and not self._has_waited:
            self._has_waited = True
            self._note(
                f"step {step}: its save waits until the checkpoint of step {pending.step} is written (told once); "
                "a larger training.save_steps leaves more time"
            )


class HostCopies:
    """Copies of tensors in host memory. Their memory is kept and used again by the next copies."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of each tensor, of its shape, dtype and sharding. It is valid until the next call."""
        copies = {}
        for name, tensor in tensors.items():
            held = self._held.get(name)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                held = torch.empty_like(
                    tensor.detach(),
                    device="cpu",
                    memory_format=torch.contiguous_format,
                    pin_memory=tensor.device.type == "cuda",
                )
            local_part(held).copy_(local_part(tensor), non_blocking=True)
            copies[name] = held
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._held = copies
        return copies


class _AtOnce(Executor):
    """Does what it is given before `submit` returns."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except BaseException as error:  # noqa: BLE001 (raised by `result`, as that of any executor)
            future.set_exception(error)
        return future
