"""Tokens are made once for the same rows and settings, by whoever comes first, and never believed when damaged."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strop.data.store.token_cache
from strop.data.load import load_data
from strop.data.store import worker_pool
from strop.data.store.row_pipeline import RowPipeline
from strop.errors import DataError

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def rows(path: Path, num: int, start: int = 0) -> str:
    path.write_text("".join(json.dumps({"prompt": f"q {i}", "completion": f"x {i}"}) + "\n" for i in range(start, num)))
    return str(path)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were worked on, call by call."""
    calls: list[int] = []
    work = RowPipeline.work

    def counting(self: RowPipeline, some: Any, file: int = 0) -> Any:
        calls.append(len(some))
        return work(self, some, file)

    monkeypatch.setattr(RowPipeline, "work", counting)
    return calls


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*/*") if path.is_dir())


def test_b13_a_second_start_reads_what_the_first_has_made(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, worked: list[int], cache: Path
) -> None:
    path = rows(tmp_path / "rows.jsonl", 20)
    tokenizer = make_tokenizer()
    first = load_data(make_config(train_file=path), tokenizer, "single")
    done = len(worked)
    # another name, another seed: the same rows
    other = shutil.copy(path, tmp_path / "other.jsonl")
    second = load_data(make_config(train_file=str(other)), tokenizer, "single")
    load_data(make_config(train_file=path, seed=7), tokenizer, "single")
    assert len(worked) == done > 0 and len(entries(cache)) == 1
    assert second.report.fingerprint == first.report.fingerprint
    assert {g.origin.file for g in second.train} == {str(other)}
    # what makes other tokens of them makes another entry
    load_data(make_config({"max_seq_length": 33}, train_file=path), tokenizer, "single")
    load_data(make_config(train_file=path, render="raw"), tokenizer, "single")
    load_data(make_config(train_file=path), make_tokenizer("sentence_piece"), "single")
    load_data(make_config(train_file=path, max_samples=3), tokenizer, "single")
    load_data(make_config(train_file=rows(tmp_path / "rows.jsonl", 21)), tokenizer, "single")
    assert len(entries(cache)) == 6


@pytest.mark.parametrize("name", ["rows.arrow", "entry.json", "rejected.jsonl"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "empty"])
def test_b13_damage_is_found_and_mended(
    name: str, how: str, tmp_path: Path, make_config: Make, make_tokenizer: Make, worked: list[int], cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(rows(path, 9)).read_text() + "{\n")
    config = make_config(train_file=str(path), on_error="skip", max_dropped_fraction=1.0)
    first = load_data(config, make_tokenizer(), "single")
    rejected = list(first.rejected)
    (entry,) = entries(cache)
    victim = entry / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    match how:
        case "flip":
            victim.write_bytes(content)
        case "cut":
            victim.write_bytes(content[:-3])
        case "gone":
            victim.unlink()
        case _:
            victim.write_bytes(b"")
    done = len(worked)
    again = load_data(config, make_tokenizer(), "single")
    assert len(worked) > done and "tokenised again" in caplog.text
    assert again.report.fingerprint == first.report.fingerprint and list(again.rejected) == rejected
    done = len(worked)
    load_data(config, make_tokenizer(), "single")
    assert len(worked) == done


def test_b7_bad_rows_stop_a_strict_run_although_a_lenient_one_has_been_there(
    tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(rows(path, 9)).read_text() + "{\n")
    load_data(make_config(train_file=str(path), on_error="skip", max_dropped_fraction=1.0), make_tokenizer(), "single")
    for _ in range(2):
        with pytest.raises(DataError, match="truncated_json") as error:
            load_data(make_config(train_file=str(path)), make_tokenizer(), "single")
        assert error.value.where == f"{path}:10"


def _load(config: Any, tokenizer: Any, pipe: Any) -> None:
    pipe.send("ready")
    pipe.recv()
    pipe.send(load_data(config, tokenizer, "single").report.fingerprint)


def test_b13_two_runs_at_once_make_one_entry(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, cache: Path
) -> None:
    config, tokenizer = make_config(train_file=rows(tmp_path / "rows.jsonl", 300)), make_tokenizer()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(3)]  # which need no shared memory, as locks and queues do
    runs = [context.Process(target=_load, args=(config, tokenizer, theirs)) for _, theirs in pipes]
    for run in runs:
        run.start()
    assert all(ours.poll(60) and ours.recv() == "ready" for ours, _ in pipes)
    for ours, _ in pipes:
        ours.send("go")
    assert all(ours.poll(60) for ours, _ in pipes)
    prints = {ours.recv() for ours, _ in pipes}
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0] and len(prints) == 1
    assert len(entries(cache)) == 1 and not list(cache.glob("*/*-*"))


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system"), ImportError("no sem_open"), NotImplementedError()]
)
def test_b13_without_shared_memory_one_process_does_it(
    error: Exception,
    tmp_path: Path,
    make_config: Make,
    make_tokenizer: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker_pool, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(worker_pool, "BATCHES_BEFORE_POOL", 2)
    monkeypatch.setattr(worker_pool, "WorkerPool", refused)
    config = make_config(train_file=rows(tmp_path / "rows.jsonl", 60), num_workers=3, validation_split=0.0)
    assert len(load_data(config, make_tokenizer(), "single").train) == 60
    assert caplog.text.count("in one process") == 1


@pytest.mark.share(1)
@pytest.mark.parametrize("limit", [None, 5, 61])
def test_b13_processes_change_nothing(
    limit: int | None, tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = Path(rows(path, 100)).read_text().splitlines()
    lines[17] = lines[64] = "{"
    path.write_text("\n".join(lines))
    monkeypatch.setattr(worker_pool, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(worker_pool, "BATCHES_BEFORE_POOL", 2)
    found = []
    for num_workers in (1, 2):
        monkeypatch.setenv("STROP_CACHE", str(tmp_path / f"cache {num_workers}"))
        config = make_config(
            train_file=str(path),
            on_error="skip",
            max_dropped_fraction=1.0,
            num_workers=num_workers,
            max_samples=limit,
            validation_split=0.0,
        )
        data = load_data(config, make_tokenizer(), "single")
        found.append((list(data.train), list(data.rejected), data.report))
    assert found[0] == found[1]
    assert len(found[0][0]) == (limit or 98)
    with pytest.raises(DataError) as error:
        load_data(make_config(train_file=str(path), num_workers=2), make_tokenizer(), "single")
    assert error.value.where == f"{path}:18"


def test_b13_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "file"))
    data = load_data(make_config(train_file=rows(tmp_path / "rows.jsonl", 5)), make_tokenizer(), "single")
    assert len(data.train) == 4 and "STROP_CACHE" in caplog.text


def test_a_cache_that_is_deleted_costs_nothing_but_time(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(rows(tmp_path / "good.jsonl", 20)).read_text() + "{\n")
    config = make_config(train_file=str(path), on_error="skip", max_dropped_fraction=1.0, validation_split=0.0)

    def load() -> tuple[list[Any], list[Any]]:
        data = load_data(config, make_tokenizer(), "single")
        shutil.rmtree(cache)  # what is open is read on
        return list(data.train), list(data.rejected)

    whole = load()
    assert len(whole[0]) == 20 and len(whole[1]) == 1
    for at in (1, 2, 3, 5, 8):  # while it is written, at any file of it
        with monkeypatch.context() as patch:
            patch.setattr("strop.data.store.token_cache.checksum_of", _deleting(cache, at))
            assert load() == whole


def _deleting(folder: Path, at: int) -> Callable[[Path], int]:
    count = 0
    real = strop.data.store.token_cache.checksum_of

    def checksum(path: Path) -> int:
        nonlocal count
        count += 1
        if count == at:
            shutil.rmtree(folder)
        return real(path)

    return checksum
