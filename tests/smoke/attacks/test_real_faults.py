"""Faults that the system itself makes: signals, full and read-only disks, pipes and devices in the place of files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import strop
from smoke.attacks.trials import LONGEST, TRAINED, Clock, Tally, few_or, fork, outcome, posix
from strop import cli, disk
from strop.cli.entry import RESUMABLE, STOPPED
from strop.config import to_yaml
from strop.errors import StropError

pytestmark = [posix, pytest.mark.usefixtures("synced")]


class Launch:
    """A copy of this process that runs a command line, its standard error in a file."""

    def __init__(self, line: list[str], stderr: Path) -> None:
        self._stderr = stderr
        self.pid = fork()
        if self.pid == 0:
            self._be_child(line)

    def _be_child(self, line: list[str]) -> None:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(self._stderr, os.O_WRONLY | os.O_CREAT, 0o600), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            code = cli.main(line)
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001 (it is told, and fails the test)
            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    def wait(self) -> int:
        clock = Clock(self.pid)
        while (code := self.poll()) is None and clock.seconds < LONGEST:
            time.sleep(0.005)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        assert code is not None, f"it hangs: {self.said}"
        return code

    @property
    def said(self) -> str:
        return self._stderr.read_text(errors="replace")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A disk of so many bytes at the folder. Yields what gives it other options."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")

    def change(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield change
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def written(config: Any, folder: Path) -> Path:
    """The configuration as a file."""
    file = folder / "run.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return file


@few_or(200)
def test_signal_storms(num: int, record_property: Any, runs: Any, tmp_path: Path) -> None:
    """Any number of SIGTERM and up to two Ctrl-C, at any time: one message, and the resumed run is the same."""
    unbroken, tally = runs(TRAINED), Tally("signal storms", record_property)
    started = time.monotonic()
    strop.train(runs.config(TRAINED))
    seconds = time.monotonic() - started
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(TRAINED)
        launch = Launch(["train", str(written(config, tmp_path)), "--resume"], tmp_path / f"{seed}.log")
        signals = [signal.SIGINT] * rng.choice((0, 0, 1, 2))
        time.sleep(rng.uniform(0, 1.1 * seconds))
        while (code := launch.poll()) is None:
            os.kill(launch.pid, signals.pop() if signals else signal.SIGTERM)
            time.sleep(rng.choice((0.0, 0.001, 0.02)))
        assert code in (0, RESUMABLE, STOPPED, -signal.SIGTERM), (seed, code, launch.said)
        assert "Traceback" not in launch.said, (seed, launch.said)
        if code in (RESUMABLE, STOPPED):
            assert "go on with: strop train" in launch.said, (seed, launch.said)
        elif "go on with" in launch.said:  # Ctrl-C came before the first step, and SIGTERM while that was being said
            assert code == -signal.SIGTERM and "what is in no checkpoint is lost" in launch.said, (seed, code)
        assert outcome(partial(strop.train, config, resume="auto")) == "done", seed
        assert runs.same_run(runs.at(Path(config.training.output_dir) / "run"), unbroken), seed
        shutil.rmtree(config.training.output_dir)
        tally.add(f"exit {code}")
    tally.tell(num)


@few_or(50)
def test_two_launches_in_one_folder(num: int, record_property: Any, runs: Any, tmp_path: Path) -> None:
    unbroken, tally = runs(TRAINED), Tally("two launches", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(TRAINED)
        line = ["train", str(written(config, tmp_path)), "--resume"]
        first = Launch(line, tmp_path / f"{seed}-1.log")
        time.sleep(rng.choice((0, 0, 0.1, 1)))
        second = Launch(line, tmp_path / f"{seed}-2.log")
        ended = sorted((launch.wait(), launch.said) for launch in (first, second))
        codes = [code for code, _ in ended]
        assert codes in ([0, 0], [0, 1]), (seed, ended)
        if codes == [0, 1]:
            assert "another run is using the folder" in ended[1][1], (seed, ended)
        assert runs.same_run(runs.at(Path(config.training.output_dir) / "run"), unbroken), seed
        shutil.rmtree(config.training.output_dir)
        tally.add("one is refused" if codes == [0, 1] else "one after the other")
    tally.tell(num)


@few_or(100)
def test_disks_that_are_really_full(
    num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file system with too little room, which says so or does not; with room again, the resume ends the run."""
    unbroken, tally = runs(TRAINED), Tally("really full disks", record_property)
    taken = sum(file.stat().st_size for file in unbroken.path.rglob("*") if file.is_file())
    for seed in range(num):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        with small_disk(folder, int(taken * rng.uniform(0.05, 1.2))) as change:
            config = runs.config(TRAINED).with_values({"training.output_dir": str(folder)}, "test")
            with watched.context() as patch:
                if rng.random() < 0.7:
                    patch.setattr(disk, "free_bytes", lambda path: None)
                took = outcome(partial(strop.train, config))
            change(f"size={20 * taken}")
            assert outcome(partial(strop.train, config, resume="auto")) == "done", (seed, took)
            assert runs.same(runs.at(folder / "run").final, unbroken.final), seed
        tally.add(took)
    tally.tell(num)


PLACES = {
    "output": ("training.output_dir", "cannot be written"),
    "logs": ("logging.logging_dir", "cannot be written"),
    "mirror": ("training.mount_dir", "cannot be written"),
    "cache": (None, ""),
}


@pytest.mark.parametrize("place", PLACES)
def test_read_only_folders(
    place: str, runs: Any, watched: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, said = PLACES[place]
    with small_disk(tmp_path / "disk", 2**20) as change:
        change("ro")
        config = runs.config(TRAINED)
        if key is None:  # what can be made again is kept for this run only
            watched.setenv("STROP_CACHE", str(tmp_path / "disk" / "cache"))
            strop.train(config)
            assert "cannot be written" in caplog.text and "set STROP_CACHE" in caplog.text
            return
        config = config.with_values({key: str(tmp_path / "disk" / "there")}, "test")
        with pytest.raises(StropError) as caught:
            strop.train(config)
        message = str(caught.value)
        assert said in message and "Read-only file system" in message and "mount the file system for writing" in message
        assert "make room" not in message


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def full(path: Path) -> None:
    path.symlink_to("/dev/full")


def listens(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


STRANGE = (fifo, endless, full, listens, Path.mkdir)
FILES = ("run.yaml", "rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.txt", "rows.parquet")


@pytest.mark.share(1)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("strange", STRANGE, ids=lambda make: make.__name__)
def test_what_is_no_file_in_the_place_of_one(strange: Callable[[Path], None], runs: Any, tmp_path: Path) -> None:
    """Each is refused in one message, and nobody waits for what a pipe may bring."""
    config = runs.config(TRAINED)
    source = Path(config.models[0].huggingface_id)
    places = [*FILES, *(f"model/{file.name}" for file in sorted(source.iterdir()))]
    for number, place in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copytree(source, folder / "model")
        rows = str(folder / place) if place.startswith("rows") else config.dataset.train_file
        file = written(config, folder)
        (folder / place).unlink(missing_ok=True)
        strange(folder / place)
        values = ["--train-file", rows, "--models.0.huggingface_id", str(folder / "model")]
        launch = Launch(["train", str(file), "--dry-run", "--no-time", *values], folder / "log")
        code = launch.wait()
        assert "Traceback" not in launch.said, (place, launch.said)
        assert code == 1 and Path(place).name in launch.said, (place, code, launch.said)
        assert launch.said.count("\n") <= 6, launch.said


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_takes_nothing_does_not_end_a_run(runs: Any, tmp_path: Path) -> None:
    unbroken, config = runs(TRAINED), runs.config(TRAINED)
    assert Launch(["train", str(written(config, tmp_path))], Path("/dev/full")).wait() == 0
    assert runs.same_run(runs.at(Path(config.training.output_dir) / "run"), unbroken)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "data.json"])
def test_a_file_of_a_run_that_leads_to_a_device(name: str, runs: Any, tmp_path: Path) -> None:
    config = runs.config(TRAINED)
    folder = Path(config.training.output_dir) / "run"
    folder.mkdir(parents=True)
    (folder / name).symlink_to("/dev/full")
    launch = Launch(["train", str(written(config, tmp_path))], tmp_path / "log")
    assert launch.wait() == 1 and "Traceback" not in launch.said and name in launch.said, launch.said
