"""Put on PYTHONPATH by the tests: processes that they start see the pretended processor, too (tests/pretend.py).

Nothing is imported before strop itself is: the hook acts once its module is there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

NAME = os.environ.get("STROP_TESTS_PRETEND")
SYNCS = os.environ.get("STROP_TESTS_SYNC") == "1"
WANTED = ("strop.machine", "strop.policy.kernels.product_rates")


class _ThenPretend(Loader):
    """The module's own loader, and a pretended processor behind it."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        try:
            import pretend
        finally:
            del sys.path[0]
        pretend.put_into(module, pretend.surroundings(NAME))


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WANTED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPretend(spec.loader)
        return spec


if NAME and not SYNCS:
    os.fsync = lambda fd: os.fstat(fd) and None  # `pretend.not_synced`
if NAME:
    sys.meta_path.insert(0, _Finder())
