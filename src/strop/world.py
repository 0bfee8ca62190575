"""The processes that train one model together, as seen by one of them. Floor 0, needs nothing but torch.

Code that has to know which process it runs in takes a `World` as an argument; nothing else reads the environment.
Whatever must be equal in all processes is decided from what these methods return: the counts of a step, its loss and
gradients, whether to stop, which files are written. With one process, every method returns what it is given.
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
    """One of `size` processes.

    rank: its number, from 0. local_rank: its number on this machine. device: where it computes.

    The abstract methods are collective: every process must call the same ones in the same order.
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
        """Deals micro-batches to processes: element r of the result is the share of rank r.

        All processes have cut the step into the same `parts`, and each takes every `size`-th of them. Rank 0 gets the
        most; other ranks may get none.
        """
        return [parts[rank :: self.size] for rank in range(self.size)]

    @abstractmethod
    def sum(self, counts: Sequence[int]) -> list[int]:
        """Each count, summed over all processes; exact integers, known on the CPU."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """The value of rank 0, in every process. It must pickle."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on the device of this process.

        A value is a tensor, a number or a dataclass of them. The first dimension of tensors may differ by process.
        """

    @abstractmethod
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over all processes. A parameter without one here gets the others' sum."""


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
