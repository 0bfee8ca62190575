"""Systems without Python's `resource` module (Windows) can import strop and measure what they can."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import psutil  # on Linux it needs resource itself
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
print("is told", machine.resident("VmHWM") == 0)
"""


def test_strop_is_imported_and_used_without_resource() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "is told True\n"
