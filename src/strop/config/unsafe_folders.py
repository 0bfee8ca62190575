"""Where runs may be written: not into folders of the operating system. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from strop.config.base_section import Problem

SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr/bin", "usr/lib", "usr/sbin")
"""Folders below the root that belong to the operating system with all that is in them."""
CROWDED = ("", "home", "usr", "usr/local", "var")
"""Folders that others share; run folders in them are a slip."""


def unsafe_folder(key: str, text: str) -> Iterator[Problem]:
    """A folder that nobody wants run folders in, links followed."""
    expected = "a folder of your own, such as ./outputs"
    if "\0" in text or not text.strip():
        return  # said already
    if text.startswith("$") or (not text.strip("./\\") and text not in (".", "./")):
        yield Problem((key,), f"{key} is {text!r}, which names no folder of its own", expected)
        return
    try:
        home = Path("~").expanduser().resolve()
        real = Path(text).expanduser().resolve()
    except UnicodeEncodeError:
        return  # said already
    except (OSError, RuntimeError) as error:  # a loop of links, a home that nobody has
        yield Problem((key,), f"{key} is {text!r}, which cannot be followed: {error}", expected)
        return
    inside = {Path("/", name).resolve() for name in SYSTEM} & {real, *real.parents}
    if Path("/dev/shm") in real.parents:
        inside.clear()
    if inside or real in {Path(real.anchor), *(Path("/", name).resolve() for name in CROWDED)}:
        yield Problem((key,), f"{key} is {text!r}: {real} is a folder of the operating system", expected)
    elif real == home and text.startswith("~"):
        yield Problem((key,), f"{key} is {text!r}, your home folder itself", expected, "write ~/outputs")
