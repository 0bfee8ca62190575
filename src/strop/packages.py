"""The versions of installed packages. Floor 0."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version


@lru_cache
def installed_version(package: str) -> str | None:
    """As its metadata says; None where it is not installed. Read once per process, since reading takes milliseconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
