"""What strop finds on this computer: versions, devices, memory, disks, caches, extras. Floor 2, no torch.

Lines to paste where one asks for help: no value of a variable that may hold a secret is among them, and the home folder
is written as ~.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from strop.cachedir import cache_folder, cache_root
from strop.disk import free_bytes, in_words
from strop.errors import ConfigError, StropError, foreign_errors
from strop.machine import installed_memory, num_cores, processor_model
from strop.redact import redact

DEVELOPERS = "dev"
"""The extra that users do not need."""
SHOWN = ("STROP_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables that decide something, and whose values are no secrets."""
ONLY_WHETHER = ("HF_TOKEN", "WANDB_API_KEY")
"""Variables of which the screen says only whether they are set."""
LITTLE = 5 << 30
"""Bytes free on a disk, below which a run may not find room."""
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?")


@dataclass
class Found:
    """lines: for a person. problems: what keeps strop from working, each with what to do."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def look() -> Found:
    """Everything that can be seen without loading a model."""
    found = Found()
    _computer(found)
    _packages(found)
    _torch(found)
    _disks(found)
    _variables(found)
    return found


def _computer(found: Found) -> None:
    found.lines.append(f"python      {platform.python_version()} ({_short(sys.executable)})")
    found.lines.append(f"platform    {platform.platform()}")
    found.lines.append(f"processor   {processor_model() or 'unknown'}, {num_cores()} cores for this process")
    found.lines.append(f"memory      {in_words(installed_memory())}")


@dataclass(frozen=True)
class Requirement:
    """A package and the lowest version that will do. extra: the one that wants it; empty: strop itself."""

    name: str
    floor: str
    extra: str

    def state(self) -> tuple[str, bool]:
        """(what is installed, in words; whether it will do)."""
        try:
            there = version(self.name)
        except PackageNotFoundError:
            return f"{self.name} is missing", False
        if self.floor and numbers(there) < numbers(self.floor):
            return f"{self.name} {there} is older than {self.floor}", False
        return f"{self.name} {there}", True


def numbers(text: str) -> tuple[int, ...]:
    """A version as numbers, for comparing: 2.13.0+cpu -> (2, 13)."""
    digits = re.match(r"[\d.]*", text)
    parts = [int(part) for part in (digits[0] if digits else "").split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def requirements(lines: Sequence[str]) -> Iterator[Requirement]:
    """What a package's metadata asks for."""
    for line in lines:
        asked, _, marker = line.partition(";")
        if (match := _REQUIREMENT.match(asked.strip())) is not None:
            extra = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
            yield Requirement(match[1], match[2] or "", extra[1] if extra else "")


def _packages(found: Found) -> None:
    try:
        asked = list(requirements(requires("strop") or []))
        found.lines.append(f"strop       {version('strop')}")
    except PackageNotFoundError:
        found.problems.append(
            "strop is not installed as a package: pip install strop, or pip install -e . in its folder"
        )
        return
    extras = {r.extra: [x for x in asked if x.extra == r.extra] for r in asked if r.extra != DEVELOPERS}
    for extra, wanted in sorted(extras.items()):
        states = [r.state() for r in wanted]
        missing = [words for words, fits in states if not fits]
        if not extra:
            found.lines.append("packages    " + ", ".join(words for words, _ in states))
            found.problems += [f"{words}: pip install --upgrade strop" for words in missing]
        else:
            state = ", ".join(words for words, _ in states)
            how = f"; for it: pip install 'strop[{extra}]'" if missing else ""
            found.lines.append(f"extra       {extra}: {state}{how}")


def _torch(found: Found) -> None:
    """The devices, as torch has them; it takes seconds to load."""
    try:
        with foreign_errors(StropError):
            import torch

            cuda = torch.cuda.is_available()
            devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
            names = [f"{d.name} with {in_words(d.total_memory)}" for d in devices]
            found.lines.append(
                "device      " + (", ".join(names) or "no GPU that torch can use: runs take the processor")
            )
            found.lines.append(f"torch       {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
            if not cuda and torch.version.cuda and Path("/dev/nvidiactl").exists():
                found.problems.append(
                    "there is an NVIDIA GPU, and torch cannot use it: compare its driver with CUDA above"
                )
    except StropError as error:
        found.problems.append(f"torch cannot be loaded: {error.found}")


def _disks(found: Found) -> None:
    cache = cache_root()
    for name, path in (("this folder", Path.cwd()), ("the cache", cache)):
        free = free_bytes(path)
        found.lines.append(f"disk        {in_words(free)} free for {name}, {_short(path)}")
        if free is not None and free < LITTLE:
            found.problems.append(f"{in_words(free)} free for {name}, which may be too little for checkpoints")
    try:
        cache_folder("tokens", must_keep=True)
        found.lines.append(f"cache       {in_words(_size(cache))} in it; it may be deleted at any time")
    except ConfigError as error:
        found.lines.append(f"cache       {error.found}: {error.fix}")
    if not os.access(Path.cwd(), os.W_OK):
        found.problems.append(f"this folder cannot be written: {_short(Path.cwd())}; runs go to training.output_dir")


def _size(folder: Path) -> int:
    """Bytes of the files of a folder, as far as they can be seen."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def _variables(found: Found) -> None:
    words = [f"{name}={redact(_short(os.environ[name]))[:200]}" for name in SHOWN if name in os.environ]
    words += [f"{name} is {'set' if os.environ.get(name) else 'not set'}" for name in ONLY_WHETHER]
    found.lines.append("variables   " + ", ".join(words))


def _short(path: Path | str) -> str:
    """A path without the name of the user."""
    home, text = str(Path.home()), str(path)
    return "~" + text[len(home) :] if len(home) > 1 and text.startswith(home) else text
