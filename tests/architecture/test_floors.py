"""The house stands as docs/architecture.md says: imports go down, rooms on one floor are closed, modules stay small."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "strop"
FLOORS = {
    "errors": 0,
    "types": 0,
    "durable": 0,
    "cachedir": 0,
    "columns": 0,
    "disk": 0,
    "manifest": 0,
    "readable": 0,
    "garbage_collection": 0,
    "allocator": 0,
    "packages": 0,
    "log_arrays": 0,
    "redact": 0,
    "runfiles": 0,
    "world": 0,
    "launch_attempt": 0,
    "config": 1,
    "distributed": 3,
    "heartbeat": 2,
    "time_limit": 1,
    "batch": 1,
    "lengths": 1,
    "significance": 1,
    "machine": 1,
    "rundir": 1,
    "terminal": 1,
    "data": 2,
    "device": 4,
    "plan": 2,
    "policy": 2,
    "objectives": 2,
    "report": 2,
    "importers": 2,
    "installation": 2,
    "rewards": 2,
    "uploads": 2,
    "trackers": 2,
    "engine": 3,
    "modelrows": 3,
    "preflight": 3,
    "named_models": 3,
    "each_model": 4,
    "prepared": 4,
    "modelcard": 4,
    "rollout": 4,
    "estimate": 5,
    "disk_estimate": 5,
    "run_description": 5,
    "session": 6,
    "method_catalogue": 6,
    "push": 6,
    "export": 6,
    "generate": 7,
    "score_reference": 7,
    "newconfig": 7,
    "report_files": 7,
    "resuming": 7,
    "training": 8,
    "evaluate": 8,
    "dryrun": 8,
    "replay": 8,
    "demo": 9,
    "launch": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 10,
}
# of the same floor: these raise
NEIGHBOURS = {("cachedir", "errors"), ("disk", "errors"), ("world", "errors")}
TORCH_FREE = ("errors", "types", "config", "terminal", "cli", "__init__", "__main__")
MODULES = sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(parsed(path)))


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Absolute names of what a module imports; imports for type checkers only are left out."""
    checking = {
        id(inner)
        for node in nodes_of(path)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = parsed(path).body if top_level_only else nodes_of(path)
    names: list[str] = []
    for node in nodes:
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(str(node.module))
            names += [f"{node.module}.{a.name}" for a in node.names if node.module == "strop"]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "strop" or len(parts) < 2 or parts[1] == "__version__":
            continue
        there = parts[1]
        assert there in FLOORS, f"{there} has no floor"
        assert there == here or FLOORS[there] < FLOORS[here] or (here, there) in NEIGHBOURS, f"{here} imports {there}"


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in TORCH_FREE], ids=lambda p: str(p.relative_to(SRC)))
def test_no_torch_before_it_is_needed(path: Path) -> None:
    for name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in {"torch", "transformers", "peft", "datasets", "numpy", "safetensors"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 62, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_docstrings_name_the_floor_of_their_room(path: Path) -> None:
    named = re.findall(r"\b[Ff]loor\s+(\d+)", ast.get_docstring(parsed(path)) or "")
    assert {int(floor) for floor in named} <= {FLOORS[room(path)]}


def test_no_drawers_for_everything() -> None:
    names = {part for p in MODULES for part in p.relative_to(SRC).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_the_engine_names_no_method() -> None:
    """Neither in code nor in words: a branch on a loss would be a method in the engine as well."""
    from strop.config.methods import METHODS, LossType

    # a function of torch; what sampled completions are given, which is a metric
    methods = {*METHODS, *get_args(LossType)} - {"sigmoid", "reward"}
    for path in SRC.joinpath("engine").glob("*.py"):
        words = set(re.findall(r"[a-z_]+", path.read_text(encoding="utf-8").lower()))
        assert not words & methods, f"{path.name} names a method"
        assert not {f"{m}settings" for m in METHODS} & words
