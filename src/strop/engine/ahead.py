"""What the next step needs, made in a thread while this step computes. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Ahead(Generic[Key, Made]):
    """Calls `make`, which must be a function of its key alone: so what was begun in the thread is what would have been
    made on the spot. What goes wrong in the thread is raised where the result is taken.

    Args:
        threaded: whether anything is begun ahead.
    """

    def __init__(self, make: Callable[[Key], Made], *, threaded: bool) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, "strop-ahead") if threaded else None
        self._begun: tuple[Key, Future[Made]] | None = None

    def begin(self, key: Key) -> None:
        """Start to make what will be taken next. At most one is begun at a time: an earlier one is let go."""
        if self._pool is not None:
            self._forget()
            self._begun = key, self._pool.submit(self._make, key)

    def take(self, key: Key) -> Made:
        """What `make` gives for this key, from the thread where that has begun it."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == key:
            return begun[1].result()
        self._cancel(begun)
        return self._make(key)

    def close(self) -> None:
        """Let go of what was begun, and end the thread."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _forget(self) -> None:
        begun, self._begun = self._begun, None
        self._cancel(begun)

    @staticmethod
    def _cancel(begun: tuple[Key, Future[Made]] | None) -> None:
        if begun is not None:
            begun[1].cancel()
