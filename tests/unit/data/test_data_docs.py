"""docs/data.md: every row in it is read as it says, and it names every reason that there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from strop.data.load import FIXES, load_data
from strop.data.template import FOLDER
from strop.types import RowShape

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "data.md").read_text()


SHAPES: dict[str, RowShape] = {
    "Rows for sft": "single",
    "Rows for preferences": "pair",
    "Labelled rows (kto)": "labelled",
}
ROWS = [
    pytest.param(row, shape, id=f"{shape} {i}")
    for title, shape in SHAPES.items()
    for i, row in enumerate(
        row
        for block in re.findall(r"```json\n(.*?)```", PAGE.split(f"## {title}\n")[1].split("\n## ")[0], re.S)
        for row in block.splitlines()
    )
]


@pytest.mark.parametrize(("row", "shape"), ROWS)
def test_the_rows_in_the_page_are_trained_on(
    row: str, shape: RowShape, tmp_path: Path, make_config: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    data = load_data(make_config(train_file=str(path), validation_split=0.0), make_tokenizer(), shape)
    assert len(data.train) == (2 if shape == "labelled" and "chosen" in row else 1) and data.train[0].num_scored > 0


def test_the_page_shows_every_shape() -> None:
    assert len(ROWS) >= 18


def test_the_schema_of_data_records_is_one() -> None:
    schema = yaml.safe_load(re.findall(r"## DataRecord\n+```yaml\n(.*?)```", PAGE, re.S)[0])
    assert schema["required"] == ["inputs", "outputs"] and schema["properties"]["meta"]["type"] == "object"


def test_the_page_names_every_reason() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "strop" / "data").glob("*.py"))
    reasons = set(re.findall(r'(?:RowRefused\(|reason = )\s*"([a-z_0-9]+)"', source)) | FIXES.keys()
    assert {"sharegpt_keys", "template_error", "nothing_trained"} < reasons
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert reasons - named == set()


def test_the_page_shows_the_built_in_template() -> None:
    plain = (FOLDER / "plain.yaml").read_text()
    for words in ("User: ", "Assistant:"):
        assert words in PAGE and words in plain
