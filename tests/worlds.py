"""Several processes of one training, played by threads that wait for each other: a `World` without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from strop.policy.strategy import Replicated
from strop.world import World

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds until a meeting that not all came to fails."""


class Meeting:
    """A place where `size` threads exchange one value each."""

    def __init__(self, size: int) -> None:
        self._values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, value: T) -> list[T]:
        self._values[rank] = value
        self.barrier.wait(PATIENCE)
        found = list(self._values)
        self.barrier.wait(PATIENCE)
        return found


@dataclass(frozen=True)
class ThreadWorld(World):
    """One of the threads."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def _exchange(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def doing(self, what: str) -> None:
        pass

    def leave(self) -> None:
        pass

    def beside(self) -> World:
        return replace(self, meeting=self.on_main(lambda: Meeting(self.size)))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        own = list(parameters)
        with torch.no_grad():
            for i, grads in enumerate(zip(*self.meeting.exchange(self.rank, [p.grad for p in own]), strict=True)):
                there = [g for g in grads if g is not None]
                own[i].grad = torch.stack(there).sum(0) if there else None
            self.meeting.barrier.wait(PATIENCE)  # nobody goes on while another still reads its gradients

    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        self.any(False)
        own = list(tensors)
        for mine, first in zip(own, self.meeting.exchange(self.rank, own)[0], strict=True):
            if not self.is_main:
                mine.detach().copy_(first)
        self.meeting.barrier.wait(PATIENCE)


def replicated(weights: Mapping[str, nn.Parameter], world: World | None = None) -> Replicated:
    """How weights lie that every process has."""
    policy: Any = SimpleNamespace(trainable=lambda: dict(weights))
    return Replicated(policy, world or World.alone("cpu"))


def in_worlds(size: int, work: Callable[[World], T]) -> list[T]:
    """`work` in every process of a world of this size, all at once: what each gives, by rank."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(torch.device("cpu"), rank, size, rank, size, meeting))
        except Exception as error:  # noqa: BLE001 (raised below, in the thread of the test)
            errors.append(error)
            meeting.barrier.abort()  # the others are not to wait for it

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = threading.BrokenBarrierError
    for error in sorted(errors, key=lambda error: isinstance(error, broken)):
        raise error
    return results
