"""docs/data.md: every row in it is read as it says, and it names every reason that there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from strop.data.formats import Columns, to_example
from strop.data.load import FIXES
from strop.data.template import FOLDER
from strop.data.tokens import from_tokens, is_tokenised
from strop.types import Origin, RowShape

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "data.md").read_text()


def test_the_rows_in_the_page_are_read() -> None:
    sections: dict[str, RowShape] = {"Rows for sft": "single", "Rows for preferences": "pair"}
    for title, shape in sections.items():
        section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = [line for block in re.findall(r"```json\n(.*?)```", section, re.S) for line in block.splitlines()]
        assert len(rows) >= 3
        for row in rows:
            data = json.loads(row)
            if is_tokenised(data):
                from_tokens(data, vocabulary=20)
            else:
                to_example(data, Origin("docs/data.md", 1), shape, Columns())


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
