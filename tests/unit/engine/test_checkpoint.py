"""Checkpoints come back exactly or not at all, and letting old ones go never costs a good one."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strop import disk, durable, manifest
from strop.engine import checkpoint_writer
from strop.engine.checkpoint import newest, open_checkpoint, retire_newer
from strop.engine.checkpoint_writer import save
from strop.errors import CheckpointError
from strop.manifest import MANIFEST, read_manifest, seal


def everything(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every kind that weights, optimizers and random states are made of."""
    g = torch.Generator().manual_seed(seed)
    tied = torch.randn(3, 2, generator=g)
    return {
        "policy.layers.0.weight": torch.randn(4, 3, generator=g),
        "optimizer/exp_avg.layers.0": torch.randn(4, 3, generator=g),
        "half": torch.randn(5, generator=g).half(),
        "bf16": torch.randn(2, 3, generator=g).bfloat16(),
        "double": torch.randn(3, generator=g).double(),
        "state1": torch.randint(0, 256, (257,), dtype=torch.uint8, generator=g),
        "rng": torch.get_rng_state(),
        "step": torch.tensor(float(seed)),
        "count": torch.tensor(2**53 + seed),
        "int32": torch.tensor([-1, 2**31 - 1], dtype=torch.int32),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "strided": torch.randn(4, 6, generator=g).t()[::2],
        "expanded": torch.randn(1, generator=g).expand(5),
        "tied": tied,
        "tied too": tied,
        "subnormal and signed zero": torch.tensor([1e-45, -0.0, 0.0, torch.finfo(torch.float32).max]),
    }


def small(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((40,), float(step)), "step": torch.tensor(step)}


def put(run_dir: Path, step: int, **options: Any) -> Path:
    options = {"keep": None, **options}
    return save(run_dir, step, small(step), {"train": {"step": step}}, **options)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(t, 7, memory_format=torch.contiguous_format) for name, t in tensors.items()}


def steps(run_dir: Path) -> set[str]:
    return {p.name for p in run_dir.iterdir()}


def loaded(run_dir: Path) -> int | None:
    """The step that a resume would go on from; its tensors and its state are of that step and no other."""
    found = newest(run_dir)
    if found is None:
        return None
    tensors = like(small(0))
    found.load_into(tensors)
    assert {n: bits(t) for n, t in tensors.items()} == {n: bits(t) for n, t in small(found.step).items()}
    assert found.state == {"train": {"step": found.step}}
    return found.step


# ---- round trip


def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = everything()
    state = {
        "best": None,
        "loss": 0.1 + 0.2,
        "nan": math.nan,
        "names": ["a", "ü\n\ud800"],
        "deep": {"x": [1, 2.5, True]},
    }
    identity = {"config": "abc", "data": "def"}
    assert save(tmp_path, 7, saved, state, keep=2, identity=identity) == tmp_path / "checkpoint-7"
    found = newest(tmp_path)
    assert found is not None and (found.step, found.path, found.identity) == (7, tmp_path / "checkpoint-7", identity)
    assert math.isnan(found.state["nan"]) and {**found.state, "nan": 0} == {**state, "nan": 0}
    assert found.versions["torch"] == torch.__version__
    restored = like(saved)
    addresses = {name: t.data_ptr() for name, t in restored.items()}
    found.load_into(restored)
    assert {n: bits(t) for n, t in restored.items()} == {n: bits(t) for n, t in saved.items()}
    assert addresses == {name: t.data_ptr() for name, t in restored.items()}


def test_parameters_that_need_gradients_and_strided_targets_are_filled_in_place(tmp_path: Path) -> None:
    save(tmp_path, 1, {"w": torch.arange(6.0).reshape(2, 3)}, {}, keep=None)
    target = torch.nn.Parameter(torch.zeros(3, 2).t())
    open_checkpoint(tmp_path / "checkpoint-1").load_into({"w": target})
    assert torch.equal(target.detach(), torch.arange(6.0).reshape(2, 3)) and target.requires_grad


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save(tmp_path, 0, {}, {"a": 1}, keep=1)
    found = newest(tmp_path)
    assert found is not None and found.state == {"a": 1}
    found.load_into({})


def test_many_tensors_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(manifest, "PARALLEL_BYTES", 1)
    saved = {f"t{i}": torch.randn(10) for i in range(7)}
    path = save(tmp_path, 1, saved, {}, keep=None)
    assert len(list(path.glob("*.safetensors"))) == 4
    restored = like(saved)
    open_checkpoint(path).load_into(restored)
    assert all(torch.equal(restored[n], saved[n]) for n in saved)
    file = sorted(path.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=file.name):
        open_checkpoint(path)


def test_nothing_is_pickled_and_nobody_is_told_about_single_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put(tmp_path, 3)
        assert loaded(tmp_path) == 3
    assert [r for r in caplog.records if r.levelno >= logging.INFO] == []
    assert {p.suffix for p in (tmp_path / "checkpoint-3").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("w"), "w: only in the checkpoint"),
        (lambda t: t.update(new=torch.zeros(1)), "new: not in the checkpoint"),
        (
            lambda t: t.update(w=torch.zeros(4, 10)),
            r"w: float32 \[40\] in the checkpoint, float32 \[4, 10\] in this run",
        ),
        (lambda t: t.update(w=torch.zeros(40).bfloat16()), r"w: float32 \[40\] in the checkpoint, bfloat16 \[40\]"),
        (
            lambda t: t.update(step=torch.zeros(1, dtype=torch.int64)),
            r"step: int64 \[\] in the checkpoint, int64 \[1\]",
        ),
    ],
)
def test_other_tensors_are_listed_and_nothing_is_copied(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    put(tmp_path, 3)
    tensors = like(small(0))
    change(tensors)
    before = {n: bits(t) for n, t in tensors.items()}
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "checkpoint-3").load_into(tensors)
    assert {n: bits(t) for n, t in tensors.items()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_is_no_checkpoint(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    put(tmp_path, 3)
    spoilt = torch.zeros(9, dtype=dtype)
    spoilt[4] = value
    with pytest.raises(CheckpointError, match="NaN or infinity in w"):
        save(tmp_path, 4, {"w": spoilt, "ok": torch.zeros(2)}, {}, keep=1)
    assert steps(tmp_path) == {"checkpoint-3"}


# ---- damage


def damage(file: Path, kind: str, other: Path) -> None:
    data = file.read_bytes()
    match kind:
        case "truncated":
            file.write_bytes(data[:-1])
        case "emptied":
            file.write_bytes(b"")
        case "zeroed":
            file.write_bytes(bytes(len(data)))
        case "extended":
            file.write_bytes(data + b"\n")
        case "deleted":
            file.unlink()
        case "of another step":
            shutil.copy(other / file.name, file)
        case "linked":
            file.rename(file.parent.parent / "away")
            file.symlink_to(file.parent.parent / "away")
        case "a folder":
            file.unlink()
            file.mkdir()
        case "a pipe":
            file.unlink()
            os.mkfifo(file)
        case _:
            raise AssertionError(kind)


KINDS = ("truncated", "emptied", "zeroed", "extended", "deleted", "of another step", "linked", "a folder", "a pipe")


@pytest.mark.parametrize("name", ["shard", "state.json", MANIFEST])
@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_is_named_and_the_older_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, name: str
) -> None:
    for step in (1, 2):
        put(tmp_path, step)
    file = next((tmp_path / "checkpoint-2").glob(f"{name}*"))
    damage(file, kind, tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=file.name.split(".")[0]):
        open_checkpoint(tmp_path / "checkpoint-2")
    assert loaded(tmp_path) == 1
    assert file.name in caplog.text and "checkpoint-2" in caplog.text
    aside = "checkpoint-2" if (kind, name) == ("deleted", MANIFEST) else ".bad-checkpoint-2"
    assert steps(tmp_path) - {"away"} == {"checkpoint-1", aside}


def test_two_files_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 1)
    save(tmp_path, 1, {"a": torch.zeros(9), "b": torch.ones(9)}, {}, keep=None)
    first, second = sorted((tmp_path / "checkpoint-1").glob("shard*"))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(CheckpointError, match="not what was saved"):
        open_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("extra", [".metadata", "shard-00002-model-00001-of-00001.safetensors", "evil.py"])
def test_a_planted_file_is_refused(tmp_path: Path, extra: str) -> None:
    put(tmp_path, 1)
    (tmp_path / "checkpoint-1" / extra).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not in MANIFEST"):
        open_checkpoint(tmp_path / "checkpoint-1")


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest with a right hash of itself, and something wrong."""
    body = json.loads((path / MANIFEST).read_text())
    body.pop("manifest_sha256")
    change(body)
    (path / MANIFEST).write_text(json.dumps({**body, "manifest_sha256": manifest._hash_of(body)}, indent=1))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda b: b["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda b: b["files"].update({"..": {"bytes": 1, "sha256": "0" * 64}}),
        lambda b: b["files"].update({"state.json": {"bytes": -1, "sha256": "0" * 64}}),
        lambda b: b["files"].update({"state.json": "whatever"}),
        lambda b: b["files"].pop("state.json"),
        lambda b: b.update(format=2),
        lambda b: b.update(step="1"),
        lambda b: b.update(step=2),
        lambda b: b.pop("identity"),
        lambda b: b.update(more=1),
        lambda b: b.clear(),
    ],
)
def test_a_forged_manifest_is_refused_and_leads_nowhere(tmp_path: Path, change: Callable[[Any], object]) -> None:
    put(tmp_path, 1)
    forge(tmp_path / "checkpoint-1", lambda body: None)
    assert loaded(tmp_path) == 1
    forge(tmp_path / "checkpoint-1", change)
    assert newest(tmp_path) is None
    assert steps(tmp_path) == {".bad-checkpoint-1"}


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 200_000, b"1" * (2**24 + 1)])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    put(tmp_path, 1)
    (tmp_path / "checkpoint-1" / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("num", [200, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_every_bit_matters(num: int, tmp_path: Path) -> None:
    for step in (1, 2):
        put(tmp_path, step)
    path = tmp_path / "checkpoint-2"
    files = sorted(path.iterdir())
    draw = random.Random(0)
    for _ in range(num):
        file = draw.choice(files)
        data = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        whole = file.read_bytes()
        file.write_bytes(data)
        found = newest(tmp_path)
        assert found is not None and found.step == 1, f"bit {bit} of {file.name}"
        (tmp_path / ".bad-checkpoint-2").rename(path)
        file.write_bytes(whole)
    assert loaded(tmp_path) == 2


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    put(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-8")
    assert loaded(tmp_path) == 1
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "my favourite")
    assert open_checkpoint(tmp_path / "my favourite").step == 1


def test_several_bad_ones_in_a_row(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text("{}")
    assert loaded(tmp_path) == 1
    put(tmp_path, 2)
    (tmp_path / "checkpoint-2" / "state.json").write_text("{}")
    assert loaded(tmp_path) == 1
    assert steps(tmp_path) == {"checkpoint-1", ".bad-checkpoint-2", ".bad-checkpoint-2-2", ".bad-checkpoint-3"}


def test_one_that_was_moved_aside_for_a_successor_that_never_came_is_found(tmp_path: Path) -> None:
    for step in (1, 2):
        put(tmp_path, step)
    (tmp_path / "checkpoint-2").rename(tmp_path / durable.hidden_name("old", "checkpoint-2"))
    assert loaded(tmp_path) == 2


def test_no_checkpoint_no_folder(tmp_path: Path) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "absent") is None
    for name in ("checkpoint-1", "file"):
        with pytest.raises(CheckpointError, match="no such folder"):
            open_checkpoint(tmp_path / name)


# ---- rotation


def test_rotation_goes_by_number_and_spares_the_protected(tmp_path: Path) -> None:
    for step in range(1, 13):
        put(tmp_path, step, keep=2, protect=[4])
    assert steps(tmp_path) == {"checkpoint-4", "checkpoint-11", "checkpoint-12"}
    put(tmp_path, 13, keep=2, protect=[13])
    assert steps(tmp_path) == {"checkpoint-11", "checkpoint-12", "checkpoint-13"}


@pytest.mark.parametrize("clock", [0.0, 4e9])
def test_clocks_do_not_matter(tmp_path: Path, clock: float) -> None:
    for step in (9, 10, 11):
        put(tmp_path, step, keep=2)
        os.utime(tmp_path / f"checkpoint-{step}", (clock * (step % 2), clock))
    assert steps(tmp_path) == {"checkpoint-10", "checkpoint-11"} and loaded(tmp_path) == 11


def test_the_one_just_written_stays_even_among_higher_numbers(tmp_path: Path) -> None:
    for step in (10, 20):
        put(tmp_path, step)
    put(tmp_path, 5, keep=1)
    assert steps(tmp_path) == {"checkpoint-5"}


def test_foreign_folders_stay_and_are_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = {"checkpoint-best-DO-NOT-DELETE", "checkpoint-9999", "checkpoint-007", "checkpoint-", "step-9999"}
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("precious")
    (tmp_path / "checkpoint-5000").symlink_to(tmp_path / "checkpoint-9999")
    for step in (1, 2, 3):
        put(tmp_path, step, keep=1)
    assert loaded(tmp_path) == 3
    assert steps(tmp_path) == {*foreign, "checkpoint-5000", "checkpoint-3"}
    assert "checkpoint-9999 is ignored" in caplog.text
    assert all((tmp_path / name / "weights").read_text() == "precious" for name in foreign)


def test_a_damaged_manifest_protects_from_rotation(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (tmp_path / "checkpoint-1" / MANIFEST).write_text("{}")
    put(tmp_path, 2, keep=1)
    assert steps(tmp_path) == {"checkpoint-1", "checkpoint-2"}


def test_what_stands_in_the_way_is_moved_not_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights").write_text("precious")
    put(tmp_path, 3)
    assert loaded(tmp_path) == 3
    assert (tmp_path / ".foreign-checkpoint-3" / "weights").read_text() == "precious"
    assert "foreign" in caplog.text


def test_a_rotation_that_fails_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(durable, "discard_folder", refuse)
    put(tmp_path, 2, keep=1)
    assert loaded(tmp_path) == 2 and "could not be removed" in caplog.text


def test_a_resume_from_an_older_one_sets_the_newer_ones_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        put(tmp_path, step)
    (tmp_path / "checkpoint-9").mkdir()
    assert retire_newer(tmp_path, 2) == [tmp_path / ".retired-checkpoint-4", tmp_path / ".retired-checkpoint-6"]
    assert loaded(tmp_path) == 2 and (tmp_path / "checkpoint-9").is_dir()
    put(tmp_path, 4)
    assert retire_newer(tmp_path, 2) == [tmp_path / ".retired-checkpoint-4-2"]


# ---- disks that fail


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 100)
    with pytest.raises(CheckpointError, match="100 bytes free"):
        put(tmp_path, 2)
    assert loaded(tmp_path) == 1 and steps(tmp_path) == {"checkpoint-1"}


@pytest.mark.share(2)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_fails_at_any_call_costs_at_most_this_checkpoint(
    tmp_path: Path, on_disk: Callable[..., Any], code: int
) -> None:
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        put(folder, 1)
        failed = False

        def work(folder: Path = folder) -> None:
            nonlocal failed
            try:
                put(folder, 2, keep=1)
            except CheckpointError as error:
                failed = True
                assert os.strerror(code) in error.found and str(folder) in error.where
                assert ("free" in error.found) is (code in (errno.ENOSPC, errno.EDQUOT))

        disk = on_disk(at, OSError(code, os.strerror(code)), work)
        if disk.count < at:
            break
        # a failure after the rename leaves the whole checkpoint, which may be used
        assert loaded(folder) in ((1, 2) if failed else (2,))
        durable.recover(folder)
        assert steps(folder) <= {"checkpoint-1", "checkpoint-2"}
        put(folder, 3, keep=1)
        assert loaded(folder) == 3
    assert at > 12


def test_a_file_size_limit_like_a_quota(tmp_path: Path) -> None:
    put(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save(tmp_path, 2, {"w": torch.zeros(10_000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert steps(tmp_path) == {"checkpoint-1"} and loaded(tmp_path) == 1


def test_an_unreadable_file_counts_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        put(tmp_path, step)
    digest = manifest.hashlib.file_digest

    def fail(file: Any, name: str) -> Any:
        if "checkpoint-2" in str(file.name):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, name)

    monkeypatch.setattr(manifest.hashlib, "file_digest", fail)
    assert loaded(tmp_path) == 1


def test_the_log_names_what_was_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="strop"):
        assert newest(tmp_path) is None
    assert "state.json: 2 bytes, " in caplog.text and ".bad-checkpoint-1" in caplog.text


def test_a_sealed_folder_is_whole_where_texts_get_other_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows. The manifest is compared byte for byte."""

    def write_text(self: Path, text: str, **_: Any) -> int:
        return self.write_bytes(text.replace("\n", "\r\n").encode())

    monkeypatch.setattr(Path, "write_text", write_text)
    (tmp_path / "config.json").write_text("{\n}")
    sealed = seal(tmp_path, 3, {})
    assert read_manifest(tmp_path) == sealed
