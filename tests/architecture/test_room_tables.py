"""A package whose docstring lists its modules lists exactly those of its folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "strop"
NAMES = re.compile(r"^ *([a-z_]+/?(?:, [a-z_]+/?)*)(?: {2,}\S.*)?$")
"""A line that begins with names of modules, followed by at least two spaces and what they are, or by nothing."""
PACKAGES = sorted(SRC.rglob("__init__.py"))


def listed(docstring: str) -> list[str]:
    """Names of modules, and those of packages with a slash."""
    return [name for line in docstring.splitlines() if (found := NAMES.match(line)) for name in found[1].split(", ")]


def present(folder: Path) -> list[str]:
    modules = [path.stem for path in folder.glob("*.py") if path.name != "__init__.py"]
    return modules + [f"{path.parent.name}/" for path in folder.glob("*/__init__.py")]


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.parent.relative_to(SRC)))
def test_a_list_of_modules_is_that_of_the_folder(path: Path) -> None:
    names = listed(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    if names:
        assert sorted(names) == sorted(present(path.parent))


def test_what_counts_as_a_list() -> None:
    text = "What it is.\n\nloop, step  one step\nread/   files\nevaluation\nprose, as it stands here\ndone  : no\n"
    assert listed(text) == ["loop", "step", "read/", "evaluation", "done"]
    assert sum(bool(listed(ast.get_docstring(ast.parse(p.read_text(encoding="utf-8"))) or "")) for p in PACKAGES) > 20
