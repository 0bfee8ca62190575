"""Processes that tokenise: the same rows however they are started, ended whatever they are at, none left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from processes import start_program
from strop import time_limit
from strop.data.load import load_data
from strop.data.read.files import read_lines
from strop.data.store import worker_pool
from strop.data.store.row_pipeline import RowPipeline, json_of, may_run_away
from strop.data.store.worker_pool import work_all
from strop.errors import DataError, ModelError

Make = Callable[..., Any]
linux = pytest.mark.skipif(not time_limit.CAN_FORK, reason="processes are copied on Linux alone")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


def rows(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"prompt": text, "completion": "x"}) for text in texts]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.share(1)
@pytest.mark.parametrize("start", ["spawn", *(["fork"] if time_limit.CAN_FORK else [])])
def test_processes_of_any_start_give_the_same_rows(
    start: str, tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(worker_pool, "BATCHES_BEFORE_POOL", 1)
    path = rows(tmp_path / "rows.jsonl", [f"question {i}" for i in range(20)])
    pipeline = RowPipeline(make_config(train_file=str(path)), make_tokenizer(), "single")
    alone = list(work_all(pipeline, read_lines(str(path)), limit=None, num_workers=1))
    in_pool = list(work_all(pipeline, read_lines(str(path)), limit=None, num_workers=2, start=start))
    assert len(alone) == 5
    assert [(file, done.table, done.num_good) for file, done in alone] == [
        (file, done.table, done.num_good) for file, done in in_pool
    ]


LOADS = """
import os, sys, time
sys.path[:0] = {paths!r}
from strop.data.store import worker_pool
from strop.data.store.row_pipeline import RowPipeline
def forever(self, *_):
    open(os.path.join({folder!r}, str(os.getpid())), "w").close()
    time.sleep(1000)
RowPipeline.work = forever
pipeline = RowPipeline.__new__(RowPipeline)
members = worker_pool.WorkerPool(pipeline, 3, "fork")
from strop.data.read.row import Row
from strop.types import Origin
for n in range(3):
    members.submit([Row(Origin("f", n), {{}})], 0)
time.sleep(1000)
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_parent(number: int, tmp_path: Path) -> None:
    text = LOADS.format(paths=sys.path, folder=str(tmp_path))
    parent = start_program(text, os.devnull, os.environ)
    assert parent.pid is not None
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 3:
            assert time.monotonic() < until and parent.is_alive()
            time.sleep(0.05)
        os.kill(parent.pid, number)
        parent.join()
        assert parent.exitcode == -number
        left = [int(p.name) for p in tmp_path.iterdir()]
        while left:
            assert time.monotonic() < until, "processes are left behind"
            left = [pid for pid in left if _runs(pid)]
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.join()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def growing(tokenizer: Any, times: int) -> Any:
    """Every q becomes two, again and again."""
    doubled = [normalizers.Replace("q", "qq") for _ in range(times)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(doubled)
    return tokenizer


def slow(tokenizer: Any) -> Any:
    """A regular expression that looks at every end from every start, again and again."""
    split = pre_tokenizers.Split(Regex(r"(?=(q*)*\1r)|(?=(q+)+\2s)"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, tokenizer.backend_tokenizer.pre_tokenizer]
    )
    return tokenizer


def test_what_may_run_away_is_known(make_tokenizer: Make) -> None:
    assert not may_run_away(json_of(make_tokenizer()))
    assert all(may_run_away(json_of(tokenizer)) for tokenizer in (growing(make_tokenizer(), 1), slow(make_tokenizer())))


@pytest.mark.nightly
@linux
def test_a_tokenizer_that_fills_the_memory_is_one_error(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "BYTES", 1 << 28)
    path = rows(tmp_path / "rows.jsonl", ["hello", "xqx"])
    tokenizer = growing(make_tokenizer(), 60)
    with pytest.raises(DataError, match=r"rows\.jsonl:1 to 2: tokenising these rows takes more than \d+ GiB of memory"):
        load_data(make_config(train_file=str(path)), tokenizer, "single")


@linux
def test_a_tokenizer_that_takes_for_ever_is_one_error(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "SECONDS", 1.0)
    monkeypatch.setattr(worker_pool, "BYTES_PER_SECOND", 1e9)
    path = rows(tmp_path / "rows.jsonl", ["q" * n for n in range(100, 160)])
    with pytest.raises((DataError, ModelError), match=r"rows\.jsonl:1 to 60: .*(1 seconds of processor time|fails on)"):
        load_data(make_config(train_file=str(path)), slow(make_tokenizer()), "single")


@pytest.mark.nightly
@linux
def test_a_tokenizer_that_fills_the_memory_with_a_word_is_refused_before_any_row(
    tmp_path: Path, make_config: Make, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "BYTES", 1 << 28)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("x", "xx")] * 60)
    path = rows(tmp_path / "rows.jsonl", ["hello"])
    with pytest.raises(ModelError, match=r"its tokenizer takes more than \d+ GiB of memory"):
        load_data(make_config(train_file=str(path)), tokenizer, "single")


@pytest.mark.nightly
@linux
def test_work_that_is_tried_leaves_nothing_here() -> None:
    time_limit.tried(os._exit, 0)
    time_limit.tried(lambda: 1 / 0)  # doing it here will say so
    with pytest.raises(time_limit.TooMuch, match="1 seconds of processor time"):
        time_limit.tried(_for_ever, seconds=1)
    with pytest.raises(time_limit.TooMuch, match="GiB of memory"):
        time_limit.tried(bytes, 1 << 50)


def _for_ever() -> None:
    while True:
        pass
