"""Every family of templates, every kind of conversation: what strop trains is what the model will have to write.

One family alone: pytest tests/oracle -k "[qwen3]"
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from oracle.cells import Cell, cells
from oracle.conversations import CONVERSATIONS, KINDS
from oracle.families import family, names

FAMILIES = names()
TWINS = [name for name in FAMILIES if family(name).twin is not None]
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not FAMILIES, reason="the package trl, whose templates are the measure, is not there")


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The script that writes docs/templates.md."""
    spec = importlib.util.spec_from_file_location("templates_page", ROOT / "docs" / "templates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wrong(found: dict[str, Cell]) -> str:
    return "\n".join("\n    ".join([name, *cell.words]) for name, cell in found.items() if cell.kind == "WRONG")


def test_there_are_some_thirty_families() -> None:
    assert len(FAMILIES) >= 30 and len(TWINS) >= 25
    assert sorted(name for kind in KINDS.values() for name in kind) == sorted(CONVERSATIONS)


@pytest.mark.share(10)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_as_shipped(name: str, page: ModuleType) -> None:
    found = cells(name, twin=False)
    assert not _wrong(found), "\n" + _wrong(found)
    line = page.line(name, found)
    assert line in page.PAGE.read_text(encoding="utf-8").splitlines(), f"{line}\nwrite it by python docs/templates.py"


@pytest.mark.share(6)
@pytest.mark.parametrize("name", TWINS)
def test_the_training_twin(name: str) -> None:
    found = cells(name, twin=True)
    assert not _wrong(found), "\n" + _wrong(found)


def test_the_page_holds_no_other_family(page: ModuleType) -> None:
    rows = [line.split("|")[1].strip() for line in page.PAGE.read_text(encoding="utf-8").splitlines() if "|" in line]
    assert [row for row in rows if row.startswith("`")] == [f"`{name}`" for name in FAMILIES]
