"""A reward's name to its function. Floor 2, no torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strop.errors import ConfigError
from strop.rewards.shipped import NEEDS, SHIPPED

MODEL_PREFIX = "model:"
"""Begins the name of a reward that is a model."""


def find_reward(name: str) -> Callable[..., Any]:
    """A shipped reward, or `module:function`, or `file.py:function`.

    Raises:
        ConfigError: there is none, its module cannot be imported, or a package that it calls is missing. It says what
            is wrong with "it"; the caller says which reward that is.
    """
    module, _, function = name.rpartition(":")
    if not module:
        if name in SHIPPED:
            _require(name)
            return SHIPPED[name]
        expected = f"{', '.join(SHIPPED)}, module:function, file.py:function or model:ID"
        raise ConfigError("there is no reward of this name", expected=expected)
    try:
        loaded = _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        found: Callable[..., Any] = getattr(loaded, function)
    except Exception as error:
        raise ConfigError(
            f"it cannot be imported: {type(error).__name__}: {error}",
            expected="module:function of an importable module, or file.py:function",
            fix="paths are relative to the folder where strop is started",
        ) from error
    if not callable(found):
        raise ConfigError(f"it is no function, but of type {type(found).__name__}")
    return found


def _require(name: str) -> None:
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"it calls {package}, which is not installed",
            fix="pip install -e '.[rewards]' in strop's folder",
        )


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"strop_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
