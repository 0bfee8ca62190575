"""Files that are whole or absent, whatever stops the process. Floor 0: stdlib only.

Everything that strop leaves in a run folder is written by the few functions here, so the order of writes, syncs and
renames that a crash can cut short is decided in one file. A file or folder is written under a temporary name, synced,
renamed, and the folder that holds it synced: before the rename nothing is visible, after the last sync a power cut
cannot take it away.

Names that begin with a dot are leftovers of a process that died, and `recover` deals with them:

    .tmp-LABEL-HEX   half-written            removed
    .del-NAME-HEX    half-removed            removed
    .old-NAME-HEX    replaced, or about to   put back where NAME is missing, else removed
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_LEFTOVER = re.compile(r"\.(?P<kind>tmp|del|old)-(?P<name>.+)-[0-9a-f]{32}", re.DOTALL)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_BINARY = getattr(os, "O_BINARY", 0)  # only on Windows


def hidden_name(kind: str, label: str) -> str:
    """A name that `recover` knows: `kind` is tmp, del or old."""
    return f".{kind}-{label}-{uuid.uuid4().hex}"


class NewFile:
    """A file that is written once, front to back, hashed on its way, and synced when it is closed.

    The hash is of the bytes that were meant to be written, so a disk that stores others is found out on reading.
    Leaving a `with` block by an exception closes without a sync: the file is not to be used.
    """

    def __init__(self, path: Path) -> None:
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o666)
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        assert self._fd is not None
        self._hash.update(view)
        write_all(self._fd, view)
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


def write_all(fd: int, view: memoryview) -> None:
    """Writes all bytes to a file. Every byte that strop writes itself goes through here, so tests let it fail."""
    # a write may be short: on a full disk, at 2 GiB, after a signal
    while view:
        view = view[os.write(fd, view) :]


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Create or replace a file; readers see the whole old or the whole new one. data: or its parts, made as they are
    written."""
    temp = path.parent / hidden_name("tmp", path.name)
    try:
        with NewFile(temp) as file:
            for part in (data,) if isinstance(data, bytes) else data:
                file.write(part)
        os.replace(temp, path)
    except OSError:
        remove(temp)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """One folder, which must not exist."""
    os.mkdir(path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    if os.name == "nt":
        return  # Windows cannot sync folders, and orders renames itself
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems answer so for folders, and keep names by other means
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Sync files that another library wrote: every file under `path`, then every folder. Links are names only."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in (name for name in files if not os.path.islink(os.path.join(folder, name))):
            fd = os.open(Path(folder) / name, os.O_RDWR | _NO_FOLLOW | _BINARY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(folder))


def rename(source: Path, target: Path) -> None:
    """Give a file or folder a name that is free (or an empty folder's), durably; both stand in the same folder."""
    os.rename(source, target)
    sync_folder(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name, durably. A folder that has the name goes away afterwards, never before."""
    old = None
    if os.path.lexists(target):
        old = target.parent / hidden_name("old", target.name)
        os.rename(target, old)
    try:
        rename(source, target)
    except OSError:
        if old is not None and not os.path.lexists(target):
            os.rename(old, target)
        raise
    if old is not None:
        with suppress(OSError):  # the new folder is in place, and `recover` removes the old one
            discard_folder(old)


@contextmanager
def published(target: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder to write into; what it holds stands in `target` once the block ends, and nothing of it before.

    A folder that is not there yet, or empty, gets all files at once; so does one that is replaced. Into another folder
    they go one by one, in the reverse order of their names, each whole. If the block raises, nothing is left.

    Args:
        target: its parents are made.
        replaces: `target` holds nothing but what an earlier block has written, and loses it.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(target)
    new = _staging(target)
    try:
        yield new
        sync_tree(new)
        if replaces:
            replace_folder(new, target)
            return
        try:
            rename(new, target)
        except OSError:
            for name in sorted(os.listdir(new), reverse=True):
                os.replace(new / name, target / name)
            sync_folder(target)
    finally:
        with suppress(OSError):
            remove(new)


def _clear_up(target: Path) -> None:
    """What processes that were killed have left of one name."""
    with suppress(PermissionError):
        for path, name in _leftovers(target.parent, ("tmp", "del", "old")):
            if name == target.name and path.name.startswith(".old-") and not os.path.lexists(target):
                rename(path, target)
            elif name == target.name:
                remove(path)


def _staging(target: Path) -> Path:
    """A new folder beside `target`, or in it where nothing may be written beside it."""
    try:
        make_folder(path := target.parent / hidden_name("tmp", target.name))
    except PermissionError:
        make_folder(path := target / hidden_name("tmp", target.name))
    return path


def discard_folder(path: Path) -> None:
    """Remove a folder at once for every reader, then file by file: a half-removed one is never met by its name."""
    gone = path.parent / hidden_name("del", path.name)
    rename(path, gone)
    remove(gone)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder with all it holds; nothing there is fine."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        os.unlink(path)
        return
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        remove(path / name)
    os.rmdir(path)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing; any other, and none, is left as it is."""
    with suppress(OSError):
        os.rmdir(folder)


def recover(folder: Path) -> None:
    """Clear up after a process that died: see the table above. The caller holds the folder's lock."""
    restore_replaced(folder)
    for path, _ in _leftovers(folder, ("tmp", "del")):
        remove(path)


def restore_replaced(folder: Path) -> None:
    """Put a folder back that was moved aside for its successor where the successor never came."""
    for path, name in _leftovers(folder, ("old",)):
        if os.path.lexists(folder / name):
            discard_folder(path)
        else:
            rename(path, folder / name)


def _leftovers(folder: Path, kinds: tuple[str, ...]) -> list[tuple[Path, str]]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    found = [(name, _LEFTOVER.fullmatch(name)) for name in names]
    return [(folder / name, match["name"]) for name, match in found if match and match["kind"] in kinds]


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON as everything strop writes has it: NaN and the infinities, which JSON does not know, become null."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except (TypeError, ValueError):  # a mapping that is no dict, or a number that is not finite
        return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object of a line of a log; None where it holds no object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class JsonLines:
    """A log of one JSON object per line that a crash can cut short by a part of its last line, and by nothing else.

    A line is one write to the end of the file. It is not synced: a log line is not worth a disk's wait in every step.
    `sync` does it for all lines so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def append(self, record: Mapping[str, object]) -> None:
        if self._fd is None:
            self._fd = self._open()
        line = memoryview(f"{to_json(record)}\n".encode("utf-8", "backslashreplace"))
        size = os.fstat(self._fd).st_size
        try:
            write_all(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, size)  # no half line before the next one
            raise

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | _BINARY, 0o666)
        size = os.fstat(fd).st_size
        end = size
        while end:  # the last line of a process that died may lack its end
            start = max(0, end - 4096)
            os.lseek(fd, start, os.SEEK_SET)
            newline = os.read(fd, end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(fd, end)
        return fd

    def read(self) -> Iterator[dict[str, Any]]:
        """The records; lines that are no JSON object are left out."""
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    if (record := json_object(line)) is not None:
                        yield record

    def retain(self, keep: Callable[[dict[str, Any]], bool | None]) -> int:
        """Keep the records for which `keep` is true, in one step: the old file or the new one, never a mix.

        keep: None where the record does not tell. Such records, and lines that are no JSON object, are damage: then the
        file as it was stays beside the new one, as .bad-NAME. A half-written end is none. Returns how many they are.
        """
        self.close()
        if not self.path.exists():
            return 0
        kept, damaged = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = json_object(line)
            wanted = None if record is None else keep(record)
            if record is not None and wanted:
                kept.append(record)
            damaged += wanted is None and line.endswith(b"\n")
        if damaged:
            self._set_aside()
        temp = self.path.parent / hidden_name("tmp", self.path.name)
        try:
            with NewFile(temp) as file:
                for record in kept:
                    file.write(f"{to_json(record)}\n".encode("utf-8", "backslashreplace"))
            os.replace(temp, self.path)
        except OSError:
            remove(temp)
            raise
        sync_folder(self.path.parent)
        return damaged

    def _set_aside(self) -> None:
        """A copy of the file as it is, under a name that is free."""
        aside, number = self.path.parent / f".bad-{self.path.name}", 1
        while os.path.lexists(aside):
            number += 1
            aside = self.path.parent / f".bad-{self.path.name}-{number}"
        write_file(aside, self.path.read_bytes())

    def sync(self) -> None:
        if self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
