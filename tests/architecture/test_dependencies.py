"""What is installed is what is tested: every dependency has its floor, and a tested version that is not below it."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(text) for text in (*PROJECT["dependencies"], *(one for own in EXTRAS.values() for one in own))]
TESTED = {
    canonicalize_name(name): Version(version)
    for name, version in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
}
NAMES = {"yaml": "pyyaml", "mlflow": "mlflow-skinny"}
"""What is imported by another name than it is installed by."""
BROUGHT = {"pydantic_core"}
"""A part of another dependency, released with it."""


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_the_tested_version_is_in_the_range(requirement: Requirement) -> None:
    assert requirement.specifier or requirement.name.startswith("types-"), "no floor"
    assert TESTED[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_is_imported_is_required() -> None:
    required = {canonicalize_name(requirement.name) for requirement in REQUIRED}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in (
                {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - BROUGHT - {"strop"}
            ):
                assert canonicalize_name(NAMES.get(name, name)) in required, f"{path.name} imports {name}"
