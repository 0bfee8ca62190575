"""Tests reach the code through its public names: none puts something in the place of a private one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PATCHING = ("setattr", "delattr", "patch", "object")
OTHERS = {"_experts_implementation", "_compute_kl_logps"}
"""Private names of transformers and TRL, which have no public ones for the same."""


def is_private(name: str) -> bool:
    """Whether a dotted name has a part with one leading underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in {*name.split(".")} - OTHERS)


def private_patches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each private name that is replaced: by a call such as `monkeypatch.setattr(module, "_name", x)`
    or by `module._name = x`. An object may set its own (`self._name`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if called in PATCHING:
                yield from ((node.lineno, text) for text in texts if is_private(text))
        elif isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and is_private(target.attr):
                    owner = ast.unparse(target.value)
                    if owner not in ("self", "cls"):
                        yield node.lineno, f"{owner}.{target.attr}"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_no_private_name_is_patched(path: Path) -> None:
    found = list(private_patches(ast.parse(path.read_text(encoding="utf-8"))))
    assert not found, f"{found}: give the code an argument, or a public function, to put something else in its place"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ('monkeypatch.setattr(module, "_name", 1)', "_name"),
        ('monkeypatch.setattr("strop.module._name", 1)', "strop.module._name"),
        ('patch.object(module, "_name")', "_name"),
        ('setattr(module, "_name", 1)', "_name"),
        ("module._name = 1", "module._name"),
        ("module.part._name += 1", "module.part._name"),
        ('monkeypatch.setattr(module, "name", 1); self._name = 1; module.__doc__ = ""', None),
    ],
)
def test_what_counts_as_a_patch(code: str, name: str | None) -> None:
    assert [found for _, found in private_patches(ast.parse(code))] == ([] if name is None else [name])
