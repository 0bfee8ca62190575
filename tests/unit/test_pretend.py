"""What tests pretend is what the processes see that they start."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pretend import PRETENDED, RUNS, surroundings

CODE = """
import sys
from strop import machine
assert "torch" not in sys.modules
import torch
from strop.policy.kernels import product_rates
found = machine.processor()
print(found.cores, found.name, product_rates.measured(torch.bfloat16))
"""


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.nightly) for n in ("plain", "cores-8")), "bf16+cores-1"]
)
def test_started_processes_see_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_TESTS_PRETEND", name)
    chosen = surroundings(name)
    assert chosen.processor is not None and chosen.multiplies is not None
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    expected = f"{chosen.processor.cores} pretended {chosen.multiplies.rates(torch.bfloat16)}"
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.nightly
def test_none_is_put_in_place_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STROP_TESTS_PRETEND")
    code = "from strop import machine; print(machine.processor().name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() != "pretended", done.stderr


def test_several_are_pretended_together() -> None:
    both = surroundings("bf16+cores-1+locale+odd-path")
    assert both.multiplies == PRETENDED["bf16"].multiplies and both.processor == PRETENDED["cores-1"].processor
    assert both.environment == {**PRETENDED["cores-1"].environment, **PRETENDED["locale"].environment} and both.moved


def test_what_contradicts_or_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16 and onednn cannot be pretended together: both say multiplies"):
        surroundings("bf16+onednn")
    with pytest.raises(ValueError, match="not known: bf32; one of plain, bf16"):
        surroundings("plain+bf32")


def test_a_run_of_all_leaves_none_out() -> None:
    assert {name for run in RUNS for name in run.split("+")} == set(PRETENDED) - {"plain"}
