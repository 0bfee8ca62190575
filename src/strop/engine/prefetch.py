"""Prepares the input of the next step in a thread while the current step computes. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Prefetch(Generic[Key, Made]):
    """Calls `make(key)`, if possible before its result is needed.

    `make` must be a function of its key alone, so that a result made ahead equals one made on the spot. Errors of the
    thread are raised where the result is taken.

    Args:
        threaded: False: nothing is made ahead.
    """

    def __init__(self, make: Callable[[Key], Made], *, threaded: bool) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, "strop-ahead") if threaded else None
        self._begun: tuple[Key, Future[Made]] | None = None

    def begin(self, key: Key) -> None:
        """Starts to make what will be taken next. Only one result is made at a time: an earlier one is dropped."""
        if self._pool is not None:
            self._forget()
            self._begun = key, self._pool.submit(self._make, key)

    def take(self, key: Key) -> Made:
        """Returns `make(key)`, from the thread if it was begun there."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == key:
            return begun[1].result()
        self._cancel(begun)
        return self._make(key)

    def close(self) -> None:
        """Drops what was begun, and ends the thread."""
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
