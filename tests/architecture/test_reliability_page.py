"""docs/reliability.md names tests and files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_it_names_is_there() -> None:
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in code] == []
    files = re.findall(r"`((?:unit|smoke)/[\w/]+\.py)`", PAGE)
    assert files and [file for file in files if not (ROOT / "tests" / file).is_file()] == []
