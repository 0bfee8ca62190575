"""What a folder that strop wrote holds, and whether it still does: a checkpoint, a finished model. Floor 0.

MANIFEST.json lists every other file of the folder with its size and SHA-256, and carries a hash of itself. The hashes
find damage of any kind; they are no signature: whoever can write to the folder can also write a manifest. So nothing
that a manifest says leads outside of its folder, and no file of a checkpoint is of a kind that can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

MANIFEST = "MANIFEST.json"
"""Makes a folder one that strop wrote."""
RECIPE = "recipe"
"""Key of a final model's identity under which the settings of its run are stored, as JSON."""
NUM_STEPS = "num_steps"
"""Key of a final model's identity: how many steps its run was to have."""
BASE = "base"
"""Key of an adapter's identity: the files of the base that it was trained on, as `model_hashes.files_hash` has them."""
FORMAT = 1
"""Raised when an older strop could not read what this one writes."""
MAX_BYTES = 2**24
"""A longer manifest is none: it would list some hundred thousand files."""
_version = lru_cache(version)  # each reading takes milliseconds
PARALLEL_BYTES = 2**28
"""From this size on, files are hashed side by side."""

_PART = "[A-Za-z0-9_][A-Za-z0-9._-]*"
PlainName = Annotated[str, StringConstraints(pattern=f"^{_PART}(/{_PART})*$", max_length=255)]
"""A file's path from its folder; no part of it leads out."""


class Damaged(Exception):  # noqa: N818 (a finding, which the caller turns into a warning or an error)
    """A folder that is not what was saved; the text says which file and what is wrong with it."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Strict):
    """step: the optimizer steps behind what is saved. identity: what the run was made from, by name.
    versions: of the code that wrote it. files: every file of the folder but the manifest."""

    format: int
    step: int = Field(ge=0)
    identity: dict[str, str]
    versions: dict[str, str]
    files: dict[PlainName, FileEntry]

    @classmethod
    def of(cls, step: int, files: Mapping[str, FileEntry], identity: Mapping[str, str]) -> Manifest:
        versions = {"strop": _version("strop"), "torch": _version("torch"), "python": platform.python_version()}
        return cls(format=FORMAT, step=step, identity=dict(identity), versions=versions, files=dict(files))

    def to_text(self) -> str:
        body = self.model_dump()
        return json.dumps({**body, "manifest_sha256": _hash_of(body)}, indent=1)


def seal(folder: Path, step: int, identity: Mapping[str, str]) -> Manifest:
    """Write the manifest of a folder that other libraries filled: of what its files are now. Nothing is synced.

    Raises:
        OSError: the folder cannot be read or written.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = FileEntry(bytes=path.stat().st_size, sha256=digest)
    manifest = Manifest.of(step, files, identity)
    (folder / MANIFEST).write_bytes(manifest.to_text().encode())  # Windows would write other line ends into a text
    return manifest


def _hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def carries_manifest(folder: Path) -> bool:
    """Whether `folder` is a folder (no link) that strop finished as a checkpoint, in whatever state it is now."""
    return folder.is_dir() and not folder.is_symlink() and os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path, step: int | None = None) -> Manifest:
    """The manifest of a folder, unchanged; `step` is the one it must be of.

    Raises:
        Damaged: it is missing, not what was written, or not for this folder.
    """
    with _open_plain(folder / MANIFEST) as file:
        text = file.read(MAX_BYTES + 1)
    try:
        body = json.loads(text) if len(text) <= MAX_BYTES else None
        if not isinstance(body, dict):
            raise Damaged(f"{MANIFEST}: no JSON object")
        if body.get("format") != FORMAT:
            raise Damaged(f"{MANIFEST}: its format is {body.get('format')}; this version of strop reads {FORMAT}")
        body.pop("manifest_sha256", None)
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Damaged(f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: no JSON: {error}") from error
    if manifest.to_text().encode() != text:  # with the hash of itself, to the last blank
        raise Damaged(f"{MANIFEST}: its content is not what was saved")
    if step is not None and manifest.step != step:
        raise Damaged(f"{MANIFEST}: of step {manifest.step}, in a folder named for step {step}")
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every byte of a checkpoint and compare.

    Raises:
        Damaged: a file is missing, too many, a link, of another size, or has another content.
    """
    with os.scandir(folder) as entries:
        extra = {entry.name for entry in entries} - manifest.files.keys() - {MANIFEST}
    if extra:
        raise Damaged(f"{', '.join(sorted(extra))}: not in {MANIFEST}")
    verify_listed(folder, manifest.files)


def verify_listed(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Read every byte of these files and compare; what else is in the folder does not matter.

    Raises:
        Damaged: a file is missing, a link, of another size, or has another content.
    """
    paths = [(folder / name, entry) for name, entry in sorted(files.items())]
    if sum(entry.bytes for _, entry in paths) < PARALLEL_BYTES:
        for path, entry in paths:
            _verify(path, entry)
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing is slower than a good disk
        for result in [pool.submit(_verify, path, entry) for path, entry in paths]:
            result.result()


def _verify(path: Path, entry: FileEntry) -> None:
    with _open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise Damaged(f"{path.name}: {size} bytes, {entry.bytes} were saved")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise Damaged(f"{path.name}: its content is not what was saved")


@contextmanager
def _open_plain(path: Path) -> Iterator[BufferedReader]:
    """A regular file of the folder itself: no link, no device, no pipe to wait at."""
    try:
        with open(path, "rb", opener=_open_here) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Damaged(f"{path.name}: not a regular file")
            yield file
    except FileNotFoundError as error:
        raise Damaged(f"{path.name}: missing") from error
    except OSError as error:
        raise Damaged(f"{path.name}: cannot be read: {error.strerror or error}") from error


def _open_here(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
