"""The run folder: who may use it, what lies in it, and how it gets there whole. Floor 1, no torch.

    {output_dir}/{model name}/
        config.yaml environment.json plan.json data.json metrics.jsonl ledger.jsonl samples.jsonl
        rejected.jsonl pairs.json forecast.json result.json trackers.json report.html findings.json
        logs/margins/ logs/tensorboard/ logs/wandb/
        checkpoint-{step}/        written and read by the engine
        final/                    the finished model; its presence means that the run is done
        .lock .lock-holder.json   one process at a time

Nothing that strop did not write is ever removed, not with `overwrite` either: files are known by their names above,
checkpoints by the manifest in them, leftovers of a crash by names that nobody else gives. A run that is refused before
its first file leaves nothing, and removes no earlier run. One that is to be replaced is marked before anything else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from strop import durable
from strop.disk import refuse_in_the_way, unusable
from strop.durable import JsonLines, to_json
from strop.errors import CheckpointError, ConfigError, StropError
from strop.manifest import MANIFEST
from strop.redact import redact
from strop.runfiles import EVALUATIONS, LEDGER, METRICS, RUN_FILES, SAMPLES

logger = logging.getLogger(__name__)

FINAL = "final"
LOCK = ".lock"
LINES_AT_ONCE = 256
LOG_FOLDERS = ("margins", EVALUATIONS, "tensorboard", "wandb")
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
SET_ASIDE_NAME = re.compile(r"\.(bad|retired)-checkpoint-[0-9]+(-[0-9]+)?")
TO_BE_REPLACED = ".to-be-replaced"
"""Marks a run that `overwrite` was asked for: from then on nobody goes on with it, whenever this process dies."""


class RunDir:
    """One run folder. `RunDir(path)` names its parts; `RunDir.open` also takes the lock that writing needs."""

    def __init__(self, path: Path | str, *, logging_dir: str = "./logs") -> None:
        self.path = Path(path).expanduser().absolute()
        logs = Path(os.path.normpath(self.path / Path(logging_dir).expanduser()))
        if not logs.is_relative_to(self.path.parent) and not Path(logging_dir).expanduser().is_absolute():
            raise ConfigError(
                f"logging.logging_dir is {logging_dir}, which leads out of training.output_dir, to {logs}",
                expected="a folder in training.output_dir, relative to the run's own, or an absolute path",
                fix=f"if it is to be there, write it out: logging.logging_dir: {logs}",
            )
        # a folder that several runs may share gets one folder per run
        self.logs = logs if logs.is_relative_to(self.path) else logs / self.path.name
        self.metrics = JsonLines(self.path / METRICS)
        self.ledger = JsonLines(self.path / LEDGER)
        self.samples = JsonLines(self.path / SAMPLES)
        self._lock: filelock.BaseFileLock | None = None
        self._made: list[Path] = []  # what was not there before, innermost first
        self._has_begun = False  # it has written a file
        self._has_marked = False  # by this process
        self.replaces = False
        """Whether the run that is here goes when this one begins; until then nothing of it counts."""

    @classmethod
    def open(cls, path: Path | str, *, resume: bool, overwrite: bool, logging_dir: str = "./logs") -> Self:
        """Make or enter the folder, alone, and leave it ready: leftovers of a dead run cleared up, old runs let be.

        resume: a run may be there and is kept, unless it was to be overwritten and the process that should have done it
        is gone. overwrite: a run may be there; it is marked at once, and removed with the first file that this one
        writes. Neither: none may be.

        Raises:
            CheckpointError: no folder can be there, it cannot be written, another process uses it, or it holds a run.
        """
        if resume and overwrite:
            raise CheckpointError("resume and overwrite exclude each other", fix="give one of --resume and --overwrite")
        run = cls(path, logging_dir=logging_dir)
        run._make()
        run._acquire()
        try:
            run._settle(resume, overwrite)
        except OSError as error:
            run.close()
            raise unusable(run.path, error) from error
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Release the folder. A run that was to be replaced, and was not, is as it was before."""
        self._leave(spare=True)

    def _leave(self, *, spare: bool) -> None:
        self.metrics.close()
        self.ledger.close()
        self.samples.close()
        if self._lock is not None:
            for path in (
                (self._holder, self._mark) if spare and self._has_marked and not self._has_begun else (self._holder,)
            ):
                try:
                    durable.remove(path)
                except OSError as error:
                    logger.warning("%s could not be removed: %s", path, error)
            self._tidy()
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # refused: nothing has happened. Stopped or broken: what was asked for still holds
        self._leave(spare=kind is None or issubclass(kind, StropError))

    def _tidy(self) -> None:
        """Take away what was made for a run that never began; the lock is held until its file is gone."""
        if self._has_begun:
            return
        for path in self._made:
            if path.name == LOCK:
                with suppress(OSError):  # Windows removes no open file
                    durable.remove(path)
            else:
                durable.remove_if_empty(path)

    # ---- entering

    @property
    def _holder(self) -> Path:
        return self.path / ".lock-holder.json"

    @property
    def _mark(self) -> Path:
        return self.path / TO_BE_REPLACED

    def _make(self) -> None:
        probe = self.path / durable.hidden_name("tmp", "probe")
        self._will_make(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with durable.NewFile(probe) as file:
                file.write(b"can this folder be written?\n")
            durable.remove(probe)
        except OSError as error:
            for path in self._made:
                durable.remove_if_empty(path)
            raise unusable(self.path, error) from error

    def _will_make(self, path: Path) -> None:
        self._made[:0] = [p for p in (path, *path.parents) if not os.path.lexists(p)]

    def _acquire(self) -> None:
        lock = filelock.FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise CheckpointError(
                f"another run is using the folder: {self._describe_holder()}",
                where=str(self.path),
                fix="wait for it, stop it, or give this run another training.output_dir",
            ) from error
        except (OSError, NotImplementedError) as error:
            raise CheckpointError(
                f"the folder cannot be locked: {error}",
                where=str(self.path),
                fix="choose a training.output_dir on a file system with locks",
            ) from error
        self._lock = lock
        try:
            durable.write_file(self._holder, to_json({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            self.close()
            raise unusable(self.path, error) from error

    def _describe_holder(self) -> str:
        try:
            holder = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on host {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "it has not said yet which process it is"  # it is starting at this moment

    def _refuse_links(self) -> None:
        for name in (*RUN_FILES, FINAL, *(p.name for p in self._checkpoints())):
            self._refuse_link(self.path / name)
        for name in LOG_FOLDERS:
            self._refuse_link(self.logs / name)

    def _refuse_link(self, path: Path) -> None:
        if path.is_symlink():
            raise CheckpointError(
                f"{path.name} is a link to {os.readlink(path)}",
                where=str(path),
                expected="a file or folder of the run itself: strop writes and removes nothing through links",
                fix=f"remove the link, or let training.output_dir lie where it points to: rm {path}",
            )

    def _settle(self, resume: bool, overwrite: bool) -> None:
        """With the lock held: clear up after a dead process, and see what to do about a run that is here."""
        self._refuse_links()
        for folder in (self.path, self.logs):
            if folder.is_dir():
                durable.recover(folder)
        present = self.present()
        if overwrite and present and not os.path.lexists(self._mark):
            durable.write_file(self._mark, b"this run is to be replaced by another one\n")
            self._has_marked = True
        self.replaces = overwrite or os.path.lexists(self._mark)
        if resume and self.replaces:
            logger.warning("%s: the run here was going to be overwritten, so nothing of it is resumed", self.path)
        if not resume and not overwrite and present:
            raise CheckpointError(
                f"the folder holds another run: {', '.join(present)}",
                where=str(self.path),
                fix="--resume to go on with it, --overwrite to remove it, or another training.output_dir",
            )
        self._will_make(self.logs)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(self.logs, error, "logging.logging_dir") from error

    def _checkpoints(self) -> list[Path]:
        """Every entry with a checkpoint's name and our manifest in it."""
        return sorted(p for p in self.path.iterdir() if CHECKPOINT_NAME.fullmatch(p.name) and (p / MANIFEST).is_file())

    def present(self) -> list[str]:
        """Names in the folder that make it the folder of a run."""
        names = [name for name in (*RUN_FILES, FINAL) if (self.path / name).exists()]
        return names + [p.name for p in self._checkpoints()]

    def replaced_bytes(self) -> int:
        """What goes away before the first file of this run."""
        gone = [*self._checkpoints(), self.path / FINAL] if self.replaces else []
        return sum(file.lstat().st_size for folder in gone for file in folder.rglob("*") if file.is_file())

    def _begin(self) -> None:
        """Before the first file of this run: the run that it replaces goes away."""
        self._has_begun = True
        if self.replaces:
            self._clear()
            self.replaces = False

    def _clear(self) -> None:
        for path in (path for log in (METRICS, LEDGER) for path in self.path.glob(f".bad-{log}*")):
            durable.remove(path)
        aside = [p for p in self.path.iterdir() if SET_ASIDE_NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
        for folder in (*self._checkpoints(), *aside, self.path / FINAL, *(self.logs / name for name in LOG_FOLDERS)):
            if folder.is_dir() and not folder.is_symlink():
                durable.discard_folder(folder)
        for name in RUN_FILES:
            durable.remove(self.path / name)
        durable.sync_folder(self.path)  # the mark goes last, or what is left would be a run again
        durable.remove(self._mark)
        durable.sync_folder(self.path)

    # ---- writing

    def write_text(self, name: str, text: str | Iterable[str]) -> Path:
        """Create or replace a file of the run, whole, credentials masked. text: or parts that cut no credential."""
        assert name in RUN_FILES, name
        path, masked = self.path / name, False

        def cleaned() -> Iterator[bytes]:
            nonlocal masked
            for part in (text,) if isinstance(text, str) else text:
                clean = redact(part)
                masked = masked or clean != part
                yield clean.encode("utf-8", "backslashreplace")

        try:
            self._begin()
            durable.write_file(path, cleaned())
        except OSError as error:
            raise unusable(path, error) from error
        if masked:
            logger.warning("%s: a token or key stood in it and was masked", name)
        return path

    def write_json(self, name: str, value: object) -> Path:
        """The same, of a value that JSON can hold; NaN and the infinities become null."""
        return self.write_text(name, to_json(value, indent=2) + "\n")

    def write_lines(self, name: str, records: Iterable[Mapping[str, object]]) -> Path:
        """The same, one record per line, some at a time: there may be more than fit into memory."""
        lines = (f"{to_json(record)}\n" for record in records)
        return self.write_text(name, iter(lambda: "".join(islice(lines, LINES_AT_ONCE)), ""))

    def append(self, log: JsonLines, record: Mapping[str, object]) -> None:
        """Add a line to `metrics`, `ledger` or `samples`; NaN and the infinities become null."""
        try:
            self._begin()
            log.append(record)
        except OSError as error:
            raise unusable(log.path, error) from error

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Drop what metrics.jsonl, ledger.jsonl and samples.jsonl have after `step`, as a resume from there needs it.

        Half-written ends go too. evaluated: whether the evaluation of `step` itself stays."""

        def stays(record: Mapping[str, object]) -> bool | None:
            at, of_evaluation = record.get("step"), record.get("split") == "eval" or "completion" in record
            return at < step or (at == step and (evaluated or not of_evaluation)) if isinstance(at, int) else None

        for log in (self.metrics, self.ledger, self.samples):
            try:
                damaged = log.retain(stays)
            except OSError as error:
                raise unusable(log.path, error) from error
            tell_damage(log.path, damaged)

    # ---- the end of a run

    @property
    def final(self) -> Path:
        return self.path / FINAL

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: `final/` appears whole, as the last thing."""
        return self.final.is_dir() and not self.replaces

    def publish_final(self, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder, and make that folder `final/` once it is whole and on disk."""
        return self._publish(write, self.final)

    def mirror(self, mount_dir: Path | str) -> Path:
        """Copy `final/` and the logs to {mount_dir}/{model name}/, folder by folder, each whole or not at all.

        Raises:
            CheckpointError: the target lies in the run folder or cannot be written. The run itself is not touched.
        """
        target = self.mirror_target(mount_dir)
        for source, name in ((self.final, FINAL), (self.logs, "logs")):
            if source.is_dir():
                self._publish(partial(_copy, source), target / name)
        return target

    def mirror_target(self, mount_dir: Path | str) -> Path:
        """{mount_dir}/{model name}/, made where it is missing; the same errors as `mirror`."""
        target = Path(mount_dir).expanduser().absolute() / self.path.name
        try:
            target.mkdir(parents=True, exist_ok=True)
            self._refuse_mirror(target, mount_dir)
            durable.recover(target)
        except OSError as error:
            raise unusable(target, error, "training.mount_dir") from error
        return target

    def _refuse_mirror(self, target: Path, mount_dir: Path | str) -> None:
        inside = target.resolve()
        if any(
            inside.is_relative_to(p.resolve()) or p.resolve().is_relative_to(inside) for p in (self.path, self.logs)
        ):
            raise CheckpointError(
                "the mirror of a run cannot lie in the run folder, nor around it",
                where=f"training.mount_dir: {mount_dir}",
                fix="choose a training.mount_dir apart from training.output_dir",
            )

    def check(self, mount_dir: Path | str | None) -> list[str]:
        """Refuse the paths that a run would refuse, and make none of them. Returns names that make the folder that of
        another run.

        Raises:
            CheckpointError: a folder cannot be made or written, is a link, or the mirror lies in the run.
        """
        target = None if mount_dir is None else Path(mount_dir).expanduser().absolute() / self.path.name
        for folder in (self.path, self.logs, *((target,) if target else ())):
            refuse_in_the_way(folder)
        if target is not None:
            self._refuse_mirror(target, str(mount_dir))
        if not self.path.is_dir():
            return []
        self._refuse_links()
        return self.present()

    def _publish(self, write: Callable[[Path], None], target: Path) -> Path:
        temp = target.parent / durable.hidden_name("tmp", target.name)
        try:
            self._begin()
            durable.make_folder(temp)
            try:
                write(temp)
                durable.sync_tree(temp)
                durable.replace_folder(temp, target)
            finally:
                durable.remove(temp)
        except OSError as error:
            raise unusable(target, error) from error
        return target


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def tell_damage(path: Path, damaged: int) -> None:
    """Say what a log has lost, where it has."""
    if damaged:
        why = "%s: %d lines are damaged and are left out; the file as it was is beside it, as .bad-%s"
        logger.warning(why, path, damaged, path.name)
