"""A disk that fails or a process that dies at a chosen call, for the tests of what is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from strop import durable

CHANGING = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "ftruncate")


class Death(BaseException):
    """The process is gone: whatever the code does from here on reaches no disk."""


class Disk:
    """Stands in for `os` in strop.durable. Counts the calls that change something; at call `at`, `fault` happens.

    fault: an OSError to raise there; None: die there, after half of the data where it is a write.
    """

    def __init__(self, at: int | None = None, fault: OSError | None = None) -> None:
        self.at, self.fault = at, fault
        self.count = 0
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._watched(name, real) if name in CHANGING else real

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Death
            self.count += 1
            if self.count == self.at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.fault is not None:
                    raise self.fault
                self.dead = True
                raise Death
            return real(*args, **kwargs)

        return call


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Disk]:
    """on_disk(at, fault, work): run `work` on such a disk; Death ends it, other exceptions come through."""

    def run(at: int | None, fault: OSError | None, work: Callable[[], object]) -> Disk:
        disk = Disk(at, fault)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", disk)
            try:
                work()
            except Death:
                assert disk.dead
        return disk

    return run
