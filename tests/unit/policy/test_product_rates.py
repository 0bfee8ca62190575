"""Ways of multiplying are decided by rates: measured once, kept for all processes, and kept by a run that goes on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from strop import machine
from strop.policy.kernels import product_rates
from strop.policy.kernels.matmul import bmm, keeps_kernels, linear, widens

LOW = (torch.bfloat16, torch.float16)
FULL = (torch.float32, *LOW)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and this process as if it had measured nothing."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    product_rates._known.cache_clear()
    yield tmp_path / "rates"  # type: ignore[misc]
    product_rates._known.cache_clear()


def known(dtype: torch.dtype) -> product_rates.Rates:
    """As `measured` answers outside of tests."""
    return product_rates._known(dtype, product_rates.measured_on())


def as_another_process(monkeypatch: pytest.MonkeyPatch, found: product_rates.Rates | None = None) -> None:
    """Forget what this process knows; what is measured from here on is `found`, or an error."""

    def measure(dtype: torch.dtype) -> product_rates.Rates:
        assert found is not None, "measured again"
        return found

    product_rates._known.cache_clear()
    monkeypatch.setattr(product_rates, "measure", measure)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"bf16": 0.3}, "widened"),  # emulated
        ({"bf16": 0.6}, "widened"),  # instructions that are slower than float32's
        ({"bf16": 0.79}, "own"),  # no faster than can be measured
        ({"bf16": 2.0}, "own"),
        ({"bf16": 2.0, "onednn": 4.0}, "widened"),  # faster than MKL, not than oneDNN
    ],
)
def test_bfloat16_goes_the_faster_way(
    speeds: dict[str, float], expected: str, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(**speeds)
    assert product_rates.way(torch.bfloat16) == product_rates.way(torch.bfloat16, "batched") == expected
    assert widens(torch.bfloat16) is (expected == "widened")
    seen = []
    mm, products = torch.mm, torch.bmm
    monkeypatch.setattr(torch, "mm", lambda x, w, out=None: seen.append(x.dtype) or mm(x, w, out=out))
    monkeypatch.setattr(torch, "bmm", lambda x, y: seen.append(x.dtype) or products(x, y))
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    assert linear(x, x).dtype == bmm(x[None], x.t()[None]).dtype == torch.bfloat16
    assert seen == [torch.float32 if expected == "widened" else torch.bfloat16] * 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("onednn", "expected"), [(0.9, "own"), (1.04, "own"), (1.06, "onednn"), (3.0, "onednn")])
def test_float32_goes_the_faster_way(onednn: float, expected: str, pretend: Callable[..., None]) -> None:
    pretend(onednn=onednn, bf16=0.3)
    assert product_rates.way(torch.float32) == expected
    assert keeps_kernels(torch.float32) is keeps_kernels(torch.bfloat16) is (expected == "onednn")
    assert product_rates.way(torch.float64) == "own" and not keeps_kernels(torch.float64)


@pytest.mark.parametrize("dtype", FULL)
def test_every_way_is_measured(dtype: torch.dtype, cache: Path) -> None:
    """On this computer, as it is; the number of threads is left as it was, and no random number is drawn."""
    before, state = torch.get_num_threads(), torch.get_rng_state()
    found = known(dtype)
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)
    kinds = {"linear"} if dtype == torch.float32 else {"linear", "batched", "float32"}
    assert found.keys() == kinds and all("own" in ways for ways in found.values())
    assert all(1e6 < rate < 1e14 for ways in found.values() for rate in ways.values())


@pytest.mark.parametrize("dtype", FULL)
def test_another_process_reads_what_is_kept(dtype: torch.dtype, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = known(dtype)
    as_another_process(monkeypatch)
    assert known(dtype) == first


@pytest.mark.parametrize("other", ["torch", "processor"])
def test_another_release_or_processor_is_measured_anew(
    other: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(torch.float32)
    if other == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(machine, "processor", lambda: machine.Processor(2, "another"))
    new = {"linear": {"own": 5.0}}
    as_another_process(monkeypatch, new)
    assert known(torch.float32) == new
    assert len([*cache.iterdir()]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"linear": 3}',
        '{"linear": {"own": 0, "onednn": 1}}',
        '{"linear": {"own": "fast"}}',
        "\x00",
    ],
)
def test_a_damaged_file_is_measured_anew(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = known(torch.float32)
    (file,) = cache.iterdir()
    file.write_text(content)
    as_another_process(monkeypatch, first)
    assert known(torch.float32) == first and json.loads(file.read_text()) == first
    assert [*cache.iterdir()] == [file]


def test_of_two_that_measure_at_once_the_first_is_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = known(torch.float32)
    (file,) = cache.iterdir()
    second = {kind: {name: 2 * rate for name, rate in ways.items()} for kind, ways in first.items()}
    assert product_rates._kept(file, torch.float32, second) == first
    assert [*cache.iterdir()] == [file]


def test_a_full_disk_stops_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(product_rates, "write_file", full)
    assert known(torch.float32)["linear"]["own"] > 0
    assert not [*cache.iterdir()]


def test_a_run_keeps_its_ways(pretend: Callable[..., None]) -> None:
    """Whatever is measured later; outside they are decided as before."""
    pretend(bf16=2.0)
    chosen = product_rates.ways_of_run(torch.bfloat16)
    with product_rates.taking(chosen):
        pretend(bf16=0.3)
        assert product_rates.way(torch.bfloat16) == "own" and product_rates.ways(torch.bfloat16) == chosen
        kept = json.loads(json.dumps(product_rates.record()))
    assert product_rates.way(torch.bfloat16) == "widened" and product_rates.record() is None
    assert product_rates.ways_of_run(torch.bfloat16, kept) == chosen


def test_on_another_processor_it_decides_anew_and_says_so(
    pretend: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    pretend(bf16=2.0)
    with product_rates.taking(product_rates.ways_of_run(torch.bfloat16)):
        kept = {**product_rates.record(), "measured_on": "another"}  # type: ignore[dict-item]
    caplog.set_level(logging.WARNING, "strop")
    assert product_rates.ways_of_run(torch.bfloat16, kept)["bfloat16 linear"] == "own" and not caplog.records
    pretend(bf16=0.3)
    assert product_rates.ways_of_run(torch.bfloat16, kept)["bfloat16 linear"] == "widened"
    assert "bfloat16 linear: own then, widened now" in caplog.text


@pytest.mark.nightly
def test_two_processes_decide_alike(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the computer is: the second reads what the first has found."""
    monkeypatch.delenv("STROP_TESTS_PRETEND")
    code = (
        "import os, torch\nfrom strop.policy.kernels import product_rates as rates\n"
        "for _ in range(2):\n"
        "    if not (child := os.fork()):\n"
        "        print(rates.ways(torch.bfloat16), rates.bf16_gain(), flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == second
    assert {file.name.split("-")[0] for file in cache.iterdir()} == {"float32", "bfloat16"}
