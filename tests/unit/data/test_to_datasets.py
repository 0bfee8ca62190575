"""load_preference_jsonl: a data set with three columns, or the line that is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import strop
from strop.data.to_datasets import load_preference_jsonl
from strop.errors import DataError

TEXTS = [{"prompt": "q", "chosen": "x", "rejected": "y", "id": 1}, {"prompt": "r", "chosen": "x", "rejected": "z"}]
TURNS = [
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}],
    }
]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def test_texts_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(TEXTS))
    expected = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in TEXTS]
    sources: list[Any] = [path, str(path), io.StringIO(jsonl(TEXTS)), io.BytesIO(jsonl(TEXTS).encode())]
    for source in sources:
        data = load_preference_jsonl(source)
        assert data.column_names == ["prompt", "chosen", "rejected"]
        assert data.to_list() == expected
    assert strop.load_preference_jsonl is load_preference_jsonl


def test_one_row_of_messages_makes_all_rows_messages() -> None:
    data = load_preference_jsonl(io.StringIO(jsonl([*TEXTS, *TURNS])))
    assert data[2]["prompt"] == [{"role": "user", "content": "q"}]
    assert data[0]["chosen"] == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [(jsonl(TEXTS) + "\n{", "the open file:3.*breaks off"), (jsonl([TEXTS[0], {"prompt": "q"}]), "file:2.*missing")],
)
def test_a_bad_row_is_named_by_its_line(content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preference_jsonl(io.StringIO(content))


def test_no_rows_or_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        load_preference_jsonl(io.StringIO("\n"))
    with pytest.raises(DataError, match="cannot be read"):
        load_preference_jsonl(tmp_path / "gone.jsonl")
