"""Readers: every line stands for itself, and every row knows its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.data.read.files import jsonl_rows, parse_line, read_csv, read_json, read_jsonl, read_parquet
from strop.data.read.row import RowRefused
from strop.errors import DataError

GOOD = b'{"prompt": "a", "completion": "b"}'
BROKEN = {
    b"{": "truncated_json",
    b'{"prompt": "a': "truncated_json",
    b'{"prompt": "a"}}': "invalid_json",
    b"{'prompt': 'a'}": "invalid_json",
    b'{"n": ' + b"1" * 5000 + b"}": "invalid_json",
    b'{"prompt": "\xff"}': "invalid_utf8",
    b'"text"': "not_an_object",
    b"null": "not_an_object",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "deep_nesting",
    b'{"a": 1, "a": 2}': "duplicate_key",
    b'{"a": {"b": 1, "b": 1}}': "duplicate_key",
    b'{"a": "x\0y"}': "invalid_json",
}


@pytest.mark.parametrize("line", BROKEN, ids=BROKEN.values())
def test_a_broken_line_is_refused_with_its_reason_and_its_neighbours_are_not(line: bytes) -> None:
    rows = list(jsonl_rows([GOOD + b"\n", line + b"\n", GOOD], "f"))
    assert [row.refusal and row.refusal.reason for row in rows] == [None, BROKEN[line], None]
    assert [row.origin.line for row in rows] == [1, 2, 3]
    assert rows[1].raw == line and rows[1].refusal is not None and rows[1].refusal.found
    assert str(rows[1].refusal.at(rows[1].origin)).startswith("f:2: ")


def test_lines_end_at_lf_alone_and_cr_bom_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "a\u2028b\u2029c\x85d\u000b"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n  \n\n" + text.encode())
    rows = list(read_jsonl(str(path)))
    assert [row.data for row in rows] == [json.loads(text), None, None, json.loads(text)]
    assert [row.origin.line for row in rows] == [1, 2, 3, 4]
    assert all(row.refusal is None for row in rows)
    assert rows[0].raw_text == text


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_refusal(line: bytes) -> None:
    try:
        assert isinstance(parse_line(line), dict)
    except RowRefused as refusal:
        assert refusal.reason and refusal.found


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4))
def test_what_json_writes_is_read_back(value: dict[str, str]) -> None:
    assert parse_line(json.dumps(value).encode()) == value
    assert parse_line(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


def test_gzip_is_read_through_and_a_torn_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n" + GOOD))
    assert [row.data for row in read_jsonl(str(path))] == [json.loads(GOOD)] * 2
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read") as error:
        list(read_jsonl(str(path)))
    assert error.value.where == str(path)


def test_rows_of_an_array_know_their_lines_and_a_bad_one_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n 2}, 7,\n {"a": 1, "a": 2} , {"a": 3}\n]\n')
    rows = list(read_json(str(path)))
    assert [row.data for row in rows] == [{"a": 1}, {"a": 2}, None, None, {"a": 3}]
    assert [row.origin.line for row in rows] == [2, 4, 5, 6, 6]
    assert [row.refusal.reason for row in rows if row.refusal] == ["not_an_object", "duplicate_key"]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},]', '[{"a": 1} {"a": 2}]', '[{"a": 1}] x', "[{]", "[,]"])
def test_a_broken_array_is_refused_as_a_whole(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n" + text)
    with pytest.raises(DataError, match="array is broken") as error:
        list(read_json(str(path)))
    assert error.value.where == f"{path}:2"


def test_a_json_file_without_an_array_is_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(GOOD + b"\n{\n" + GOOD)
    assert [row.data is not None for row in read_json(str(path))] == [True, False, True]
    path.write_text("[]")
    assert list(read_json(str(path))) == []


def test_csv_rows_know_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 300_000
    path.write_text(f'prompt,completion\r\n"a\r\nb","say ""hi"""\r\n\r\nc\r\nd,{long}\r\n', newline="")
    rows = list(read_csv(str(path)))
    assert [row.origin.line for row in rows] == [2, 4, 5, 6]
    assert rows[0].data == {"prompt": "a\r\nb", "completion": 'say "hi"'}
    assert rows[1].data is None and rows[1].refusal is None
    assert rows[2].refusal is not None and rows[2].refusal.reason == "wrong_columns"
    assert rows[3].data == {"prompt": "d", "completion": long}


@pytest.mark.parametrize(("content", "line"), [(b'a,b\n1,2\n"x', 3), (b"a,b\n1,\xff\n", 2)])
def test_a_broken_csv_file_is_refused_with_its_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_csv(str(path)))
    assert error.value.where == f"{path}:{line}"


def test_parquet_rows_come_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": i} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    read = list(read_parquet(str(path)))
    assert [row.data for row in read] == rows
    assert [row.origin.line for row in read] == [1, 2, 3]
    assert json.loads(read[0].raw_text) == rows[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_parquet(str(path)))


def test_one_object_over_several_lines_is_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    # the last of these lines would be a row, and the others broken
    path.write_text('{"version": 1, "data": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n")
    with pytest.raises(DataError, match="one JSON object with 'version', 'data'"):
        list(read_json(str(path)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.data for row in read_json(str(path))] == rows
    path.write_text(json.dumps(rows[0], indent=1))
    with pytest.raises(DataError, match="JSON Lines: one object on every line"):
        list(read_json(str(path)))
    path.write_text("{\n" + json.dumps(rows[0]))
    assert [row.data for row in read_json(str(path))] == [None, rows[0]]


def test_a_table_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.table(columns, names=["prompt", "completion", "completion"]), path)
    with pytest.raises(DataError, match="two columns are named 'completion'"):
        list(read_parquet(path))
