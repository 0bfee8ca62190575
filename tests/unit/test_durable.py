"""Files are whole or absent, leftovers are cleared up, and nothing else is touched."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop import durable
from strop.durable import JsonLines

pytestmark = pytest.mark.usefixtures("synced")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    durable.write_file(tmp_path / "a", b"old")
    durable.write_file(tmp_path / "a", b"new")
    assert tree(tmp_path) == {"a": b"new"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.write_file(tmp_path / "a", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_file(tmp_path / "a", b"new")
    assert tree(tmp_path) == {"a": b"old"}


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: write(fd, data[:3]))
    with durable.NewFile(tmp_path / "a") as file:
        file.write(b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789" and file.num_bytes == 10


def test_remove_does_not_follow_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("kept")
    doomed = tmp_path / "doomed"
    (doomed / "sub").mkdir(parents=True)
    (doomed / "sub" / "link").symlink_to(precious)
    (doomed / "file").write_text("")
    durable.remove(doomed)
    durable.remove(doomed)  # gone already is fine
    assert tree(tmp_path) == {"precious": None, "precious/data": b"kept"}


def test_recover_knows_its_own_leftovers_from_other_peoples_files(tmp_path: Path) -> None:
    for kind in ("tmp", "del"):
        leftover = tmp_path / durable.hidden_name(kind, "12")
        leftover.mkdir()
        (leftover / "part").write_text("half")
    (tmp_path / durable.hidden_name("tmp", "config.yaml")).write_text("half")
    others = [".tmp-mine", ".del-", ".tmp-12-0123", ".hidden", "tmp-12-" + "0" * 32, ".old-x-" + "g" * 32]
    for name in others:
        (tmp_path / name).write_text("kept")
    durable.recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_recover_puts_back_what_was_moved_aside_for_a_successor_that_never_came(tmp_path: Path) -> None:
    for name, successor in (("a", False), ("b", True)):
        old = tmp_path / durable.hidden_name("old", name)
        old.mkdir()
        (old / "f").write_text("old")
        if successor:
            (tmp_path / name).mkdir()
            (tmp_path / name / "f").write_text("new")
    durable.recover(tmp_path)
    assert tree(tmp_path) == {"a": None, "a/f": b"old", "b": None, "b/f": b"new"}


def test_replace_folder_puts_the_old_one_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(durable.os, "rename", failing)
    with pytest.raises(OSError, match="Input"):
        durable.replace_folder(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "f").read_text() == "target"


def test_a_folder_that_is_discarded_is_never_half_there(tmp_path: Path, on_disk: Callable[..., Any]) -> None:
    for at in itertools.count(1):
        home = tmp_path / str(at)
        (home / "folder").mkdir(parents=True)
        for name in "abc":
            (home / "folder" / name).write_text(name)
        disk = on_disk(at, None, lambda home=home: durable.discard_folder(home / "folder"))
        assert not (home / "folder").exists() or len(tree(home)) == 4
        durable.recover(home)
        assert len(tree(home)) in (0, 4)
        if not disk.dead:
            break
    assert at > 5


def test_json_lines_are_valid_json_whatever_the_floats(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    record = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "text": "line\nbreak \ud800 \u2028"}
    log.append(record)
    log.append({"step": 2})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "log").read_bytes().split(b"\n")
    first = json.loads(lines[0], parse_constant=refuse)
    assert first == {"a": None, "b": [None, 1.5], "c": {"d": None}, "text": "line\nbreak \ud800 \u2028"}
    assert len(lines) == 3 and lines[2] == b""


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b"{", b'{"step": 3}', b"x" * 9000])
def test_a_half_written_last_line_goes_away(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + half)
    log = JsonLines(path)
    log.append({"step": 4})
    log.close()
    assert [r["step"] for r in log.read()] == [1, 2, 4]
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + half)
    log.retain(lambda record: record["step"] <= 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = JsonLines(tmp_path / "log")
    log.append({"step": 1})
    write = os.write
    full = iter([False, True])

    def filling_up(fd: int, data: memoryview) -> int:
        if next(full):
            raise OSError(28, "No space left on device")
        return write(fd, data[:4])

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "write", filling_up)
        with pytest.raises(OSError, match="No space"):
            log.append({"step": 2})
    log.append({"step": 3})
    assert [r["step"] for r in log.read()] == [1, 3]
    log.close()


def test_cutting_keeps_going_lines_exact(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    records = [{"step": s, "loss": 1 / s, "text": "ü\u2028" * s} for s in range(1, 8)]
    for record in records:
        log.append(record)
    before = (tmp_path / "log").read_bytes()
    log.retain(lambda record: True)
    assert (tmp_path / "log").read_bytes() == before
    log.retain(lambda record: record["step"] <= 3)
    log.append({"step": 4})
    log.close()
    assert list(log.read()) == [*records[:3], {"step": 4}]


def test_the_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        JsonLines(tmp_path / "log").append({})
    assert (tmp_path / "elsewhere").read_text() == "kept"


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_a_published_folder_is_whole_or_not_there_wherever_the_process_dies(
    there: str, tmp_path: Path, on_disk: Callable[..., Any]
) -> None:
    def write(folder: Path) -> None:
        with durable.published(folder) as new:
            for name in ("train", "val"):
                (new / name).write_text(name)

    whole = {"train": b"train", "val": b"val"}
    for at in itertools.count(1):
        target = tmp_path / str(at) / "out"
        target.parent.mkdir()
        if there != "nothing":
            target.mkdir()
        disk = on_disk(at, None, lambda target=target: write(target))
        assert (tree(target) if target.exists() else {}) in ({}, whole)
        if not tree(target):
            write(target)  # the next one clears up after the dead
        assert tree(target.parent) == {"out": None, "out/train": b"train", "out/val": b"val"}
        if not disk.dead:
            assert at > 4
            return


def test_a_published_folder_that_replaces_another_is_the_old_one_or_the_new_one(
    tmp_path: Path, on_disk: Callable[..., Any]
) -> None:
    def write(folder: Path, text: str) -> None:
        with durable.published(folder, replaces=True) as new:
            for name in ("train", "val"):
                (new / name).write_text(text)

    for at in itertools.count(1):
        target = tmp_path / str(at) / "out"
        write(target, "old")
        disk = on_disk(at, None, lambda target=target: write(target, "new"))
        durable.recover(target.parent)
        assert {path.read_text() for path in target.iterdir()} in ({"old"}, {"new"})
        assert len(list(target.iterdir())) == 2
        # whoever is killed again while it clears up loses nothing, either
        on_disk(at, None, lambda target=target: write(target, "newer"))
        durable.recover(target.parent)
        assert len({path.read_text() for path in target.iterdir()}) == 1
        if not disk.dead:
            return


def test_into_a_folder_that_holds_something_files_go_whole_and_in_order(
    tmp_path: Path, on_disk: Callable[..., Any]
) -> None:
    for at in itertools.count(1):
        target = tmp_path / str(at)
        target.mkdir()
        (target / "mine").write_text("kept")

        def write(target: Path = target) -> None:
            with durable.published(target) as new:
                for name in ("train", "val"):
                    (new / name).write_text(name)

        disk = on_disk(at, None, write)
        found = {name: text for name, text in tree(target).items() if not name.startswith(".")}
        assert found.pop("mine") == b"kept"
        assert found in ({}, {"val": b"val"}, {"train": b"train", "val": b"val"})
        if not disk.dead:
            assert len(found) == 2
            return


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), durable.published(tmp_path / "out") as new:
        (new / "half").write_text("x")
        raise ValueError("no")
    assert tree(tmp_path) == {}
