"""Systems without Python's `resource` module (Windows) can import strop and measure what they can."""

from __future__ import annotations

import os
from pathlib import Path

from processes import start_program

CODE = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "strop"]:
    del sys.modules[name]  # what it needs has been imported, and strop as if for the first time
sys.modules["resource"] = None  # how Python keeps a module from being imported
import importlib, pkgutil
import strop
for module in pkgutil.walk_packages(strop.__path__, "strop."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from strop import machine
from strop import time_limit
from strop.data.text import sandbox
time_limit.bound_time(60.0)
time_limit.bound_memory()
with sandbox.bounded_memory():
    pass
machine.Path = lambda name: type("Absent", (), {"exists": lambda self: False})()  # no /proc, either
print("is told", machine.resident("VmHWM") == 0, file=sys.stderr)
"""


def test_strop_is_imported_and_used_without_resource(tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.touch()
    process = start_program(CODE, str(said), os.environ)
    process.join(120)
    assert process.exitcode == 0, said.read_text()
    assert said.read_text() == "is told True\n"
