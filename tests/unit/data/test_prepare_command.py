"""`strop prepare`: what goes in comes out, split for ever alike, without duplicates and leaks."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from strop.cli import main
from strop.config.methods import METHODS
from strop.data.load import load_data
from strop.data.split_files import write_split_files
from strop.errors import DataError

Make = Callable[..., Any]
ROWS = [{"prompt": f"q {i} \u4e16", "completion": f'x {i}, "y"', "more": "z"} for i in range(20)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return lines(folder / "train.jsonl"), lines(folder / "val.jsonl")


def as_file(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_b6_what_goes_in_comes_out(kind: str, tmp_path: Path) -> None:
    result = write_split_files([as_file(tmp_path, kind, ROWS)], tmp_path / "out", "single", val_fraction=0.2)
    train, held = written(tmp_path / "out")
    assert len(held) == 4 and sorted(train + held, key=ROWS.index) == ROWS
    assert train == sorted(train, key=ROWS.index)
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics == json.loads(json.dumps(result.as_dict()))
    assert (statistics["num_read"], statistics["splits"]["val.jsonl"]["rows"]) == (20, 4)


def test_b6_splits_are_a_function_of_seed_and_rows(tmp_path: Path) -> None:
    path = as_file(tmp_path, "jsonl", ROWS)
    found = []
    for n, seed in enumerate((1, 1, 2)):
        write_split_files([path], tmp_path / str(n), "single", seed=seed)
        found.append(written(tmp_path / str(n)))
    assert found[0] == found[1] != found[2]


def test_b6_duplicates_and_leaks_go(tmp_path: Path) -> None:
    rows = [*ROWS, *ROWS[:3], {**ROWS[4], "completion": "another"}]
    result = write_split_files([as_file(tmp_path, "jsonl", rows)], tmp_path / "out", "single", val_fraction=0.3)
    train, held = written(tmp_path / "out")
    assert result.duplicates == 3 and len(train) + len(held) == 21
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    kept = write_split_files([str(tmp_path / "rows.jsonl")], tmp_path / "all", "single", keep_duplicates=True)
    assert kept.duplicates == 0 and sum(split["rows"] for split in kept.splits.values()) == 24
    (tmp_path / "val").mkdir()
    given = as_file(
        tmp_path / "val", "jsonl", [ROWS[0], {**ROWS[1], "completion": "z"}, {"prompt": "n", "completion": "x"}]
    )
    leaks = write_split_files([str(tmp_path / "rows.jsonl")], tmp_path / "given", "single", val_inputs=[given])
    assert (leaks.duplicates, leaks.leaks) == (4, 1)
    assert [row["prompt"] for row in written(tmp_path / "given")[1]] == ["n"]


def test_b6_refused_rows_are_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "x", "rejected": "y"}\n\n{"prompt": "q"}\n{\n')
    result = write_split_files([str(path)], tmp_path / "out", "pair")
    assert result.refused == {"missing_field": 1, "truncated_json": 1} and result.num_read == 3
    assert [(r["line"], r["raw"]) for r in lines(tmp_path / "out" / "rejected.jsonl")] == [
        (3, '{"prompt": "q"}'),
        (4, "{"),
    ]
    with pytest.raises(DataError, match="there already"):
        write_split_files([str(path)], tmp_path / "out", "pair")
    path.write_text("{}\n")
    with pytest.raises(DataError, match="no row is good"):
        write_split_files([str(path)], tmp_path / "none", "pair")


@pytest.mark.parametrize(("kind", "shape"), [("sft", "single"), ("dpo", "pair"), ("kto", "labelled")])
def test_b6_examples_train(
    kind: str, shape: Any, tmp_path: Path, make_config: Make, make_tokenizer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--example", kind, "--output-dir", str(tmp_path)]) == 0
    assert "dataset.splits_dir" in capsys.readouterr().out
    data = load_data(make_config(splits_dir=str(tmp_path)), make_tokenizer(), shape)
    assert (len(data.train), len(data.eval)) == (36, 4)


def test_b6_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_file(tmp_path, "csv", [{"q": "a", "good": "x", "bad": "y"}, {"q": "b", "good": "x", "bad": "y"}])
    out = str(tmp_path / "out")
    columns = ["--prompt-column", "q", "--chosen-column", "good", "--rejected-column", "bad"]
    assert main(["prepare", "--input", path, "--output-dir", out, "--method", "dpo", *columns]) == 0
    assert "train.dpo.jsonl: 1 row, " in capsys.readouterr().out
    for arguments, words in (
        (["--input", path], "--output-dir"),
        (["--output-dir", out], "neither --input nor --example"),
        (["--input", path, "--example", "sft", "--output-dir", out], "--input and --example"),
        (["--input", path, "--output-dir", out, "--val-fraction", "1"], "--val-fraction"),
        (["--input", str(tmp_path / "none.jsonl"), "--output-dir", out + "2"], "there is no such file"),
    ):
        assert main(["prepare", *arguments]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--input rows.jsonl --example sft --output-dir out", "--input and --example are both given"),
        ("--output-dir out", "neither --input nor --example is given"),
        ("--input rows.jsonl --output-dir out --seed -1", "--seed is -1"),
        ("--input rows.jsonl --output-dir rows.jsonl", "there already|cannot be written|Not a directory"),
        ("--example dpo --output-dir rows.jsonl", "the files cannot be written"),
    ],
)
def test_b6_flags_that_do_not_fit_are_refused(
    flags: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row)
    assert main(["prepare", *flags.split()]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert (tmp_path / "rows.jsonl").read_text() == row


def test_b6_a_split_without_rows_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert main(["prepare", "--input", "rows.jsonl", "--output-dir", "out", "--val-fraction", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 row read" in said and ": 0 rows\n" in said


@pytest.mark.nightly
def test_b6_refused_rows_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = json.dumps({"prompt": "q", "note": "x" * 2000}) + "\n"
    for n in (200, 4000):
        path.write_text(json.dumps(ROWS[0]) + "\n" + bad * n)
        tracemalloc.start()
        write_split_files([str(path)], tmp_path / str(n), "single", val_fraction=0.0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(lines(tmp_path / str(n) / "rejected.jsonl")) == n
        assert peak < 4 << 20  # 4,000 of them are 8 MB


def test_b6_credentials_in_refused_rows_are_masked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "postgres://me:pa55@host/db"}\n')
    write_split_files([str(path)], tmp_path / "out", "single")
    (row,) = lines(tmp_path / "out" / "rejected.jsonl")
    assert row["raw"] == '{"prompt": "postgres://[redacted]@host/db"}' and row["line"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_b6_every_method_s_name_is_known(
    method: str, tmp_path: Path, make_config: Make, make_tokenizer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = METHODS[method].ROWS
    assert main(["prepare", "--example", method, "--output-dir", str(tmp_path / "example")]) == 0
    example = str(tmp_path / "example" / f"example.{method}.jsonl")
    assert main(["prepare", "--input", example, "--method", method, "--output-dir", str(tmp_path / "out")]) == 0
    assert f"post_training.method: {method}" in capsys.readouterr().out
    data = load_data(make_config(splits_dir=str(tmp_path / "out")), make_tokenizer(), shape)
    assert (len(data.train), len(data.eval)) == (36, 4)


def test_b6_columns_that_cannot_be_written_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "x", "image": {"bytes": b"\x89PNG"}, "note": None}]
    result = write_split_files([as_file(tmp_path, "parquet", rows)], tmp_path / "out", "single")
    assert written(tmp_path / "out")[0] == [{"prompt": "q", "completion": "x", "note": None}] and not result.refused
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": "q", "completion": "x", "note": "\\ud800"}\n')
    write_split_files([str(odd)], tmp_path / "odd", "single")
    assert written(tmp_path / "odd")[0][0]["note"] == "\ud800"


def test_b6_turns_that_nothing_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}]
    path = as_file(tmp_path, "jsonl", [{"messages": turns}])
    assert main(["prepare", "--input", path, "--output-dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "1 trailing_turn" in said and "rows.jsonl:1" in said and "on_trailing_user" in said
    flags = ["--on-trailing-user", "drop", "--output-dir", str(tmp_path / "out")]
    assert main(["prepare", "--input", path, *flags]) == 0
    assert written(tmp_path / "out")[0] == [{"messages": turns}]


def test_b6_labels_of_another_name(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "x", "good": True} for i in range(3)]
    flags = ["--method", "kto", "--label-column", "good", "--output-dir", str(tmp_path / "out")]
    assert main(["prepare", "--input", as_file(tmp_path, "jsonl", rows), *flags]) == 0
    assert len(lines(tmp_path / "out" / "train.kto.jsonl")) == 2
