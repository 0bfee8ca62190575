"""Files, folders and caches as nobody wants them: one clear message or the right rows, never anything else."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from strop.data.load import load_data
from strop.data.read import files
from strop.data.store import worker_pool
from strop.data.store.row_pipeline import RowPipeline
from strop.errors import ConfigError, DataError

Make = Callable[..., Any]
NUM_ROWS = 9
GOOD = "".join(json.dumps({"prompt": f"q {i}", "completion": f"x {i}"}) + "\n" for i in range(NUM_ROWS))

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def load(make_config: Make, make_tokenizer: Make) -> Make:
    tokenizer = make_tokenizer()

    def run(path: Path | None = None, **dataset: Any) -> Any:
        named = {"train_file": str(path)} if path else {}
        return load_data(make_config(**{"validation_split": 0.0, **named, **dataset}), tokenizer, "single")

    return run


@posix
@pytest.mark.parametrize("name", ["pipe.jsonl", "loop.jsonl", "zero.jsonl", "folder.jsonl"])
def test_b7_what_is_no_file_is_not_opened(name: str, tmp_path: Path, load: Make) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError) as error:
        load(tmp_path / name)
    assert error.value.where == str(tmp_path / name) and error.value.fix
    (tmp_path / "rows.jsonl").write_text(GOOD)
    with pytest.raises(ConfigError, match="there is no template"):
        load(tmp_path / "rows.jsonl", template=str(tmp_path / name))


def test_b7_a_line_without_end_is_not_read_into_memory(
    tmp_path: Path, load: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    assert len(load(path).train) == NUM_ROWS
    path.write_text(GOOD + "x" * 1000)
    with pytest.raises(DataError, match="a line of more than") as error:
        load(path, on_error="skip")
    assert error.value.where == f"{path}:{NUM_ROWS + 1}"


def test_b7_two_columns_of_one_name_are_refused(tmp_path: Path, load: Make) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,prompt\nq,x,r\n")
    with pytest.raises(DataError, match="two columns are named 'prompt'"):
        load(path)


@pytest.mark.parametrize("num", [60, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_b7_a_damaged_parquet_file_is_rows_or_one_error(num: int, tmp_path: Path, load: Make) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([json.loads(line) for line in GOOD.splitlines()]), path)
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), min(num, len(whole)))
    seen = set()
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            data = load(path, on_error="skip", max_dropped_fraction=1.0)
            seen.add(sum(split.rows_read for split in data.report.splits.values()) <= NUM_ROWS)
        except DataError as error:
            seen.add(str(path) in error.where)
    assert seen == {True}


@pytest.mark.parametrize("key", ["fraction", "weight"])
def test_b1_a_share_of_nothing_is_one_clear_error(key: str, tmp_path: Path, load: Make) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"of 9 good rows none is left(.|\n)*weight"):
        load(sources=[{"name": str(tmp_path / "rows.jsonl"), key: 0.01}])


def test_b13_rows_that_change_while_they_are_read_are_not_kept(
    tmp_path: Path, load: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    work = RowPipeline.work

    def writing(self: RowPipeline, *args: Any) -> Any:
        path.write_text(GOOD.replace("x", "y"))
        return work(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RowPipeline, "work", writing)
        patch.setattr(worker_pool, "ROWS_AT_ONCE", 4)
        with pytest.raises(DataError, match="changed while they were read"):
            load(path)
    assert not [entry for entry in cache.glob("*/*") if entry.is_dir()]
    path.write_text(GOOD)
    assert len(load(path).train) == NUM_ROWS


def test_b13_every_flipped_bit_of_an_entry_is_found_or_harmless(tmp_path: Path, load: Make, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "{\n")
    options = {"on_error": "skip", "max_dropped_fraction": 1.0}
    first = load(path, **options)
    (entry,) = cache.glob("*/*/entry.json")
    whole = entry.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(whole)), 40):
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        entry.write_bytes(content)
        again = load(path, **options)
        assert again.report == first.report and list(again.rejected) == list(first.rejected)


@posix
def test_b13_a_run_that_is_killed_leaves_nothing_that_stays(tmp_path: Path, load: Make, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)

    def killed(self: RowPipeline, *args: Any) -> Any:
        os.kill(os.getpid(), 9)

    child = os.fork()
    if child == 0:
        RowPipeline.work = killed  # type: ignore[method-assign]
        load(path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert len(list(cache.glob("*/*-*"))) == 1
    assert len(load(path).train) == NUM_ROWS
    assert not list(cache.glob("*/*-*"))


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file can grow above this: what a full disk looks like."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_b13_a_full_disk_is_one_clear_error(tmp_path: Path, load: Make, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    with small_files(1000), pytest.raises(DataError, match="the token cache cannot be written"):
        load(path)
    assert not [entry for entry in cache.glob("*/*") if entry.is_dir()]
    assert len(load(path).train) == NUM_ROWS
