"""docs/data.md names every reason that there is. Its rows and commands are run by tests/smoke/test_data_page.py."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from strop.data.load import FIXES
from strop.data.text.chat_template import FOLDER

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "data.md").read_text()


def test_the_schema_of_data_records_is_one() -> None:
    schema = yaml.safe_load(re.findall(r"## DataRecord\n+```yaml\n(.*?)```", PAGE, re.S)[0])
    assert schema["required"] == ["inputs", "outputs"] and schema["properties"]["meta"]["type"] == "object"


def test_the_page_names_every_reason() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src" / "strop" / "data").rglob("*.py"))
    reasons = set(re.findall(r'(?:RowRefused\(|reason = )\s*"([a-z_0-9]+)"', source)) | FIXES.keys()
    assert {"sharegpt_keys", "template_error", "nothing_trained"} < reasons
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert reasons - named == set()


def test_the_page_shows_the_built_in_template() -> None:
    plain = (FOLDER / "plain.yaml").read_text()
    for words in ("User: ", "Assistant:"):
        assert words in PAGE and words in plain
