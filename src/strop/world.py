"""The processes that train one model together, as seen by one of them. Floor 0, needs nothing but torch.

Code that has to know which process it runs in takes a `World` as an argument. Only who writes to the
terminal is read from the environment, since there may be no world then (`terminal.rank`, `cli/entry.py`). Whatever must
be equal in all processes is decided from what these methods return: the counts of a step, its loss and gradients,
whether to stop, which files are written. With one process, every method returns what it is given.

A process that fails calls `tell` in place of its next collective method. That call then fails in the other processes
too, so none of them waits for one that never comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from strop.errors import ConfigError, PeerError, StropError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

TOLD = "told"
"""Attribute of an error that the other processes have heard of."""


@dataclass(frozen=True)
class Failure:
    """What a process that failed exchanges in place of a value.

    rank: its number. why: its message. memory: whether memory ran out, so that all processes can try again with less.
    """

    rank: int
    why: str
    memory: bool = False


class PeerMemoryError(RuntimeError):
    """Memory ran out in another process; all of them try again."""


@dataclass(frozen=True)
class World(ABC):
    """One of `size` processes.

    rank: its number, from 0. local_rank: its number on this machine, which has local_size of them. device: where it
    computes.

    `sum`, `any`, `on_main`, `gather`, `tell`, `sum_gradients`, `share_tensors`, `beside` and `mesh` are collective:
    every process must call the same ones in the same order. Only `tell` may stand for any other; it makes the others
    raise `PeerError` or `PeerMemoryError`.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def alone(device: torch.device | str) -> World:
        """A world of one process."""
        return _Alone(torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the terminal: rank 0."""
        return self.rank == 0

    @abstractmethod
    def doing(self, what: str) -> None:
        """Notes what this process does from now on, so that the others can say it if this one hangs or is gone."""

    @abstractmethod
    def leave(self) -> None:
        """Ends the connection to the other processes. Nothing is called after it."""

    def own_share(self, parts: Sequence[T]) -> Sequence[T]:
        """The share of this process in parts that cost about the same: every `size`-th of them."""
        return parts[self.rank :: self.size]

    def sum(self, counts: Sequence[int]) -> list[int]:
        """Each count, summed over all processes; exact integers, known on the CPU."""
        return [sum(column) for column in zip(*self._exchange_checked(list(counts)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self._exchange_checked(flag))

    def on_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in rank 0, in every process. Only rank 0 calls it. The value must pickle."""
        brought: Any = make() if self.is_main else None
        first: T = self._exchange_checked(brought)[0]
        return first

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on the device of this process.

        A value is anything that pickles; in it, the first dimension of tensors may differ by process.
        """
        return self._exchange_checked(value)

    def tell(self, error: BaseException, *, memory: bool = False) -> None:
        """Makes the collective call that the other processes are in fail, since this one has failed.

        Args:
            memory: memory ran out here, and all processes are to repeat what they did.
        """
        self._exchange(Failure(self.rank, str(error) or type(error).__name__, memory))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails in all processes if it fails in one.

        Rank 0, which speaks to the user, raises its own error, or `PeerError` with the message of the process that
        failed. The others raise `PeerError`. Such blocks may be nested: an error is told once.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if not _was_told(error):  # else the others have left by now, and nobody would hear it
                self.tell(error)
                vars(error)[TOLD] = True
            if self.is_main or not isinstance(error, StropError):
                raise
            raise PeerError(f"process 0 says what is wrong: {error}") from error

    def _exchange_checked(self, value: T) -> list[T]:
        """The values of all processes, by rank.

        Raises:
            PeerError, PeerMemoryError: another process has failed.
        """
        brought = self._exchange(value)
        failures = [one for one in brought if isinstance(one, Failure)]
        for failure in failures:
            if not failure.memory:
                raise PeerError(f"process {failure.rank} of {self.size} failed: {failure.why}")
        for failure in failures:
            raise PeerMemoryError(f"in process {failure.rank}: {failure.why}")
        return brought

    @abstractmethod
    def _exchange(self, value: Any) -> list[Any]:
        """As `_exchange_checked`, but unchecked: a process that failed gives a `Failure`, which is returned as a value.
        Tensors are on the device of this process."""

    @abstractmethod
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over all processes. A parameter without one here gets the others' sum."""

    @abstractmethod
    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replaces the values of these tensors by those of rank 0; shapes and dtypes are the same in all processes."""

    @abstractmethod
    def beside(self) -> World:
        """The same processes, over a connection of its own: for a thread that exchanges values with the threads of the
        other processes while this one goes on. Collective."""

    def connected(self) -> AbstractContextManager[None]:
        """A block of collective calls, in which an error means that the connection to the other processes broke. Where
        memory runs out in it, this process ends at once with its message: the others wait for it in the same call,
        where `tell` does not reach them.

        Raises:
            LostError, GoneError: in place of that error.
        """
        return nullcontext()

    def mesh(self, shard_size: int | None) -> DeviceMesh:
        """The processes in replicas of `shard_size` (None: all), for code that makes collective calls of its own.
        Collective.

        A process that fails after this may find the others in such a call, where `tell` does not reach them. Then it
        ends by itself after some seconds, with its message, and they end because it is gone.

        Raises:
            ConfigError: `shard_size` does not divide the number of processes, or there is nothing between them that
                such code could use, as in a world of one process.
        """
        raise ConfigError(
            f"the model cannot be sharded: torch.distributed connects no processes of this run, which has {self.size}",
            where="gpu.fsdp",
            expected="several processes, started by `strop train` or torchrun",
            fix="leave gpu.fsdp out, or start several processes: --num-processes 2",
        )

    def __deepcopy__(self, _: dict[int, Any]) -> World:
        return self


def _was_told(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, has been told to the other processes."""
    return error is not None and (TOLD in vars(error) or _was_told(error.__cause__))


@dataclass(frozen=True)
class _Alone(World):
    def _exchange(self, value: T) -> list[T]:
        return [value]

    def doing(self, what: str) -> None:
        pass

    def leave(self) -> None:
        pass

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        pass

    def beside(self) -> World:
        return self
