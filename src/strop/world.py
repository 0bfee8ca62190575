"""The processes that train one model together, as one of them sees them. Floor 0: torch alone.

Who needs to know which process this is gets a `World` as an argument, and nobody asks the environment. Everything that
must be the same everywhere is decided from what these methods return: counts of a step, its loss and gradients, whether
to stop, which files are written. With one process, every method returns what it was given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class World(ABC):
    """One of `size` processes. rank: its number, from 0; local_rank: its number on this machine; device: where it
    computes.

    Processes meet in the methods below: all of them must call the same one, in the same order.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def alone(device: torch.device | str) -> World:
        """A world of one process."""
        return _Alone(torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the terminal: rank 0."""
        return self.rank == 0

    def deal(self, parts: Sequence[T]) -> list[Sequence[T]]:
        """The micro-batches of each process, by rank, of those that all have cut alike: every `size`-th. Rank 0 has the
        most; others may have none."""
        return [parts[rank :: self.size] for rank in range(self.size)]

    @abstractmethod
    def sum(self, counts: Sequence[int]) -> list[int]:
        """Each count, summed over all processes; exact integers, known on the CPU."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """What rank 0 gave: a value that pickles."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank: tensors (of any number of rows, which may differ from process to process),
        numbers, and dataclasses of them. On the device of this process."""

    @abstractmethod
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes. One that only other processes have is made here."""


@dataclass(frozen=True)
class _Alone(World):
    def sum(self, counts: Sequence[int]) -> list[int]:
        return list(counts)

    def any(self, flag: bool) -> bool:
        return flag

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass
