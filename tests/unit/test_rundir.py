"""The run folder: one run, one process, whole files, and nobody else's removed."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from strop import durable
from strop.errors import CheckpointError, ConfigError, StropError
from strop.manifest import MANIFEST
from strop.rundir import TO_BE_REPLACED, RunDir
from strop.runfiles import RUN_FILES

HOLD = """
import sys, time
from strop.rundir import RunDir
with RunDir.open(sys.argv[1], resume=True, overwrite=False):
    print("held", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {".lock", ".lock-holder.json"}


def fill(folder: Path) -> set[str]:
    """A folder with everything that a run leaves."""
    ours = {*RUN_FILES, "final/model.safetensors", f"checkpoint-4/{MANIFEST}", f".bad-checkpoint-3/{MANIFEST}"}
    ours |= {"logs/margins/margins_log.jsonl", "logs/tensorboard/events", "checkpoint-4/state.json"}
    for name in ours:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return ours


# ---- opening


def test_a_fresh_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "out" / "deep" / "model", resume=False, overwrite=False) as run:
        assert run.logs == tmp_path / "out" / "deep" / "model" / "logs"
        assert run.logs.is_dir() and not run.is_finished and run.present() == []


@pytest.mark.parametrize("where", ["out", "out/model", "out/model/deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"no folder can be made here: .*out is in the way"):
        RunDir.open(tmp_path / where, resume=False, overwrite=False)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, data: memoryview) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable.os, "write", refuse)
    with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
        RunDir.open(tmp_path / "run", resume=True, overwrite=False)
    assert str(tmp_path / "run") in str(caught.value)
    assert ("free" in caught.value.found) is (code == errno.ENOSPC)


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", f"checkpoint-12/{MANIFEST}", "final/model.safetensors"]
)
def test_another_run_is_refused_and_named_and_both_ways_on_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError) as caught:
        RunDir.open(tmp_path, resume=False, overwrite=False)
    text = str(caught.value)
    assert name.split("/")[0] in text and "--resume" in text and "--overwrite" in text
    RunDir.open(tmp_path, resume=True, overwrite=False).close()  # the refusal has let go of the lock
    assert (tmp_path / name).exists()


def test_other_peoples_files_are_no_run_and_stay(tmp_path: Path) -> None:
    for name in ("notes.txt", "checkpoint-9999/weights", "checkpoint-best-DO-NOT-DELETE/weights", ".tmp-mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = names(tmp_path)
    for overwrite in (False, True):
        with RunDir.open(tmp_path, resume=False, overwrite=overwrite) as run:
            run.write_text("config.yaml", "")
        (tmp_path / "config.yaml").unlink()
        assert names(tmp_path) == before


@pytest.mark.parametrize("foreign", [(), ("notes.txt",), ("logs/mine.log",)])
def test_a_run_that_comes_to_nothing_leaves_nothing(tmp_path: Path, foreign: tuple[str, ...]) -> None:
    folder = tmp_path / "out" / "model"
    for name in foreign:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for logging_dir in ("logs", "deep/logs", str(tmp_path / "elsewhere")):
        with RunDir.open(folder, resume=True, overwrite=False, logging_dir=logging_dir):
            assert folder.is_dir()
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_comes_to_nothing_overwrites_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    RunDir.open(tmp_path, resume=False, overwrite=True).close()
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_overwrite_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path)
    foreign = {"notes.txt", "logs/mine.log", "checkpoint-7/weights", "checkpoint-best/x", "final.bak/x", "config.yml"}
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    with RunDir.open(tmp_path, resume=False, overwrite=True) as run:
        run.write_text("config.yaml", "")
        run.write_text("data.json", "")
    assert names(tmp_path) == foreign | {"config.yaml", "data.json"}


@pytest.mark.parametrize("name", ["config.yaml", "final", "checkpoint-4", "logs/margins"])
def test_links_are_refused_and_what_they_point_to_stays(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text("precious")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link to"):
        RunDir.open(tmp_path / "run", resume=False, overwrite=True)
    assert (elsewhere / MANIFEST).read_text() == "precious"


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exclude"):
        RunDir.open(tmp_path, resume=True, overwrite=True)


def test_a_second_run_is_refused_at_once_with_the_holder(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, resume=False, overwrite=False):
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on host"):
            RunDir.open(tmp_path, resume=True, overwrite=False)
        assert time.monotonic() - started < 2
    RunDir.open(tmp_path, resume=True, overwrite=False).close()


def test_a_killed_process_lets_go_of_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} "):
            RunDir.open(tmp_path, resume=True, overwrite=False)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunDir.open(tmp_path, resume=True, overwrite=False).close()


@pytest.mark.parametrize(
    ("logging_dir", "expected"),
    [("./logs", "run/logs"), ("a/b", "run/a/b"), ("../shared", "shared/run"), ("{tmp}/all", "all/run")],
)
def test_a_log_folder_outside_of_the_run_gets_a_part_of_its_own(
    tmp_path: Path, logging_dir: str, expected: str
) -> None:
    assert RunDir(tmp_path / "run", logging_dir=logging_dir.format(tmp=tmp_path)).logs == tmp_path / expected


# ---- writing


def test_files_are_replaced_whole_and_floats_are_valid_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_json("data.json", {"rows": 3})
    run.write_json("data.json", {"share": math.nan, "rows": 4})
    assert json.loads((tmp_path / "data.json").read_text()) == {"share": None, "rows": 4}
    run.write_lines("rejected.jsonl", [{"line": 1}, {"line": 2}])
    assert (tmp_path / "rejected.jsonl").read_text() == '{"line": 1}\n{"line": 2}\n'
    assert names(tmp_path) == {"data.json", "rejected.jsonl"}


def test_no_credential_reaches_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "hf_" + "a1B2c3D4e5" * 3
    run = RunDir(tmp_path)
    run.write_text("config.yaml", f"name: https://x?token={secret}\n")
    run.write_lines("rejected.jsonl", [{"row": f"my token is {secret}"}])
    assert all(secret.encode() not in p.read_bytes() for p in tmp_path.iterdir())
    assert "config.yaml" in caplog.text and secret not in caplog.text


def test_cut_metrics_keeps_each_step_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 11):
        run.append(run.metrics, {"step": step, "split": "train", "loss": math.nan if step == 3 else 1 / step})
        if step % 5 == 0:
            run.append(run.metrics, {"step": step, "split": "eval", "loss": 0.5})
    run.metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "split": "tr')  # killed here
    for step in range(6, 9):
        if step == 6:
            run.rewind(5)
        run.append(run.metrics, {"step": step, "split": "train", "loss": 2.0})
    run.metrics.close()
    records = list(run.metrics.read())
    assert [(r["step"], r["split"]) for r in records] == [
        *((s, "train") for s in range(1, 6)), (5, "eval"), *((s, "train") for s in range(6, 9)),
    ]  # fmt: skip
    assert records[2]["loss"] is None
    run.rewind(0)
    assert list(run.metrics.read()) == []


def test_cutting_metrics_that_are_not_there_is_fine(tmp_path: Path) -> None:
    RunDir(tmp_path).rewind(5)


# ---- the end


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "config.json").write_text(text)

    return write


def test_final_appears_whole_or_not_at_all(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    whole = {"final/model.safetensors", "final/sub/config.json"}
    (tmp_path / "count").mkdir()
    calls = on_disk(None, None, lambda: RunDir(tmp_path / "count").publish_final(writer("new"))).count
    assert calls > 6
    for at in range(1, calls + 1):
        folder = tmp_path / f"run-{at}"
        folder.mkdir()
        run = RunDir(folder)
        on_disk(at, None, lambda run=run: run.publish_final(writer("new")))
        durable.recover(folder)
        assert names(folder) in (set(), whole)
        assert run.is_finished == (names(folder) == whole)
        run.publish_final(writer("again"))
        assert names(folder) == whole and (folder / "final" / "model.safetensors").read_text() == "again"


def test_a_final_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    for at in range(1, 40):
        folder = tmp_path / f"run-{at}"
        folder.mkdir()
        run = RunDir(folder)
        run.publish_final(writer("old"))
        disk = on_disk(at, None, lambda run=run: run.publish_final(writer("new")))
        durable.recover(folder)
        texts = {p.read_text() for p in folder.rglob("*") if p.is_file()}
        assert len(texts) == 1 and len(names(folder)) == 2 and run.is_finished
        if not disk.dead:
            assert texts == {"new"}
            return
    raise AssertionError("the last call was never reached")


def test_a_failing_writer_leaves_no_final_and_no_litter(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space"):
        RunDir(tmp_path).publish_final(fail)
    assert list(tmp_path.iterdir()) == []


def overwrite(folder: Path) -> None:
    with RunDir.open(folder, resume=False, overwrite=True) as run:
        run.write_text("config.yaml", "")


def test_killed_while_overwriting_then_overwritten_again(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    at = 0
    while True:
        at += 1
        folder = tmp_path / f"run-{at}"
        fill(folder)
        (folder / "notes.txt").write_text("precious")
        disk = on_disk(at, None, lambda f=folder: overwrite(f))
        if not disk.dead:
            break
        # filelock releases with the process; here the object that holds the lock is gone
        overwrite(folder)
        assert names(folder) == {"notes.txt", "config.yaml"}
    assert at > 20


def test_mirror_copies_final_and_logs_and_replaces_an_older_mirror(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "out" / "model")
    fill(run.path)
    (tmp_path / "mount" / "model").mkdir(parents=True)
    (tmp_path / "mount" / "model" / "notes.txt").write_text("precious")
    (tmp_path / "mount" / "model" / durable.hidden_name("tmp", "final")).write_text("of a run that was killed here")
    for text in ("first", "second"):
        (run.final / "model.safetensors").write_text(text)
        assert run.mirror(tmp_path / "mount") == tmp_path / "mount" / "model"
        assert (tmp_path / "mount" / "model" / "final" / "model.safetensors").read_text() == text
    assert names(tmp_path / "mount" / "model") == {
        "notes.txt", "final/model.safetensors", "logs/margins/margins_log.jsonl", "logs/tensorboard/events",
    }  # fmt: skip


def test_a_mirror_has_the_links_among_the_logs(tmp_path: Path) -> None:
    """W&B leaves links to its newest run and to the log of that."""
    run = RunDir(tmp_path / "out" / "model")
    fill(run.path)
    wandb = run.logs / "wandb"
    (wandb / "run-1").mkdir(parents=True)
    (wandb / "run-1" / "debug.log").write_text("said")
    (wandb / "latest-run").symlink_to("run-1")
    (wandb / "debug.log").symlink_to("run-1/debug.log")
    there = run.mirror(tmp_path / "mount") / "logs" / "wandb"
    assert (there / "latest-run").is_symlink() and (there / "debug.log").is_symlink()
    assert (there / "debug.log").read_text() == "said"


@pytest.mark.parametrize("mount", ["out", "out/model", "out/model/logs", "out/model/logs/x"])
def test_a_mirror_in_the_run_itself_is_refused(tmp_path: Path, mount: str) -> None:
    run = RunDir(tmp_path / "out" / "model")
    fill(run.path)
    before = names(run.path)
    with pytest.raises(CheckpointError, match="mirror"):
        run.mirror(tmp_path / mount)
    assert names(run.path) == before


def test_a_run_that_is_to_be_replaced_stays_so_until_it_is(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    """Whenever the process that overwrites dies: the old run as it was, or one that nobody goes on with."""

    def begun(folder: Path) -> Path:
        with RunDir.open(folder, resume=False, overwrite=True) as run:
            run.write_text("config.yaml", "old")
            run.publish_final(lambda path: (path / "model").write_text("old") and None)
        return folder

    def overwritten(folder: Path) -> None:
        with RunDir.open(folder, resume=False, overwrite=True) as run:
            run.write_text("config.yaml", "new")

    at, dead = 0, True
    while dead:
        at += 1
        folder = begun(tmp_path / str(at))
        dead = on_disk(at, None, lambda folder=folder: overwritten(folder)).dead
        marked = (folder / TO_BE_REPLACED).exists()
        with suppress(StropError), RunDir.open(folder, resume=True, overwrite=False) as run:
            assert run.is_finished == ((folder / "final").exists() and not marked)
            raise StropError("refused")  # a refusal takes nothing back that another process has asked for
        with RunDir.open(folder, resume=True, overwrite=False) as run:
            assert run.replaces == marked
            run.write_text("data.json", "{}")
            assert not marked or run.present() == ["data.json"]
            assert not (folder / TO_BE_REPLACED).exists()
    assert at > 5


@pytest.mark.parametrize("damage", ["{", '{"split": "train"}', "\x00\x00", "[" * 100_000])
def test_damage_in_a_log_is_told_and_kept(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(tmp_path)
    lines = [f'{{"step": {n}}}' for n in (1, 2, 3)]
    text = "\n".join([lines[0], damage, *lines[1:]]) + "\n"
    run.metrics.path.write_text(text)
    for number, aside in enumerate((".bad-metrics.jsonl", ".bad-metrics.jsonl-2")):
        run.metrics.path.write_text(text)
        run.rewind(2)
        assert (tmp_path / aside).read_text() == text
        assert [record["step"] for record in run.metrics.read()] == [1, 2]
        assert caplog.text.count("1 lines are damaged") == number + 1
    run.rewind(1)
    assert caplog.text.count("damaged") == 2


@pytest.mark.parametrize("logs", ["../../elsewhere", "./../../x", "a/../../../../y"])
def test_logs_do_not_lead_out_of_where_runs_are_written(logs: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leads out of"):
        RunDir(tmp_path / "out" / "run", logging_dir=logs)
    assert RunDir(tmp_path / "out" / "run", logging_dir="../logs").logs == tmp_path / "out" / "logs" / "run"
    assert RunDir(tmp_path / "out" / "run", logging_dir=str(tmp_path / "z")).logs == tmp_path / "z" / "run"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A process that was forked while the lock was held."""
    script = (
        "import os, sys, time\nfrom strop.rundir import RunDir\n"
        "run = RunDir.open(sys.argv[1], resume=True, overwrite=False)\nworker = os.fork()\n"
        "if worker == 0:\n    os.close(1)\n    time.sleep(60)\n    os._exit(0)\n"
        "print(worker, flush=True)\nos._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, check=True)
    worker = int(done.stdout)
    try:
        os.kill(worker, 0)  # it is there
        RunDir.open(tmp_path, resume=True, overwrite=False).close()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.nightly
def test_lines_are_not_held_in_memory(tmp_path: Path) -> None:
    rows = ({"line": n, "raw": "x" * 2000} for n in range(8000))
    with RunDir.open(tmp_path, resume=False, overwrite=False) as run:
        tracemalloc.start()
        path = run.write_lines("rejected.jsonl", rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(path.read_text().splitlines()) == 8000
    assert peak < 4 << 20  # they are 16 MB
