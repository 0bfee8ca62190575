"""The benchmark runs on its smallest case, and its report says what was measured and nothing else."""

from __future__ import annotations

import importlib
import io
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import grpo, measure, step_ratio, tokenising
from benchmarks.cases import TOY
from benchmarks.report import main as make_report
from benchmarks.sides import check_side

from processes import apart

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    real = {name: value for name, value in os.environ.items() if name != "STROP_TESTS_PRETEND"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**real, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(results: Path) -> tuple[str, str]:
    """The table and the plot made of the results in a folder."""
    table, plot = results / "RESULTS.md", results / "plot.svg"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", f"--results={results}", f"--table={table}", f"--plot={plot}"])
        make_report()
    return table.read_text(encoding="utf-8"), plot.read_text(encoding="utf-8")


def stored(seconds: dict[str, float]) -> dict[str, Any]:
    """A result of two rounds with these seconds, the second round twice as slow for all."""
    sides = [
        {
            side: {
                "seconds": s * slow,
                "wall": 10.0,
                "peak": 100.0,
                "base_mib": 60.0,
                "fed_tokens": 30,
                "real_tokens": 20,
                "machine": {"busy_cores": 0.1},
            }
            for side, s in seconds.items()
        }
        for slow in (1, 2)
    ]
    case = {
        "name": "made-up",
        "shape": "toy",
        "rows": "toy",
        "bf16": False,
        "sides": list(seconds),
        "targets": [{"figure": "seconds", "against": "G", "ratio": 3.0}],
    }
    machine = {"processor": "a processor", "cores": 2, "date": "2026-01-01", "torch": "2"}
    rounds = [{"matmul": {"fp32": 1e9, "bf16": 1e9}, "sides": found} for found in sides]
    return {
        "case": case,
        "threads": 2,
        "machine": machine,
        "needed_flops": 1e9,
        "sharing_factor": 1.4,
        "rounds": rounds,
    }


@pytest.mark.parametrize(("trl", "met"), [(8.0, "yes"), (4.0, "no")])
def test_the_report_compares_within_rounds(tmp_path: Path, trl: float, met: str) -> None:
    (tmp_path / "a-processor").mkdir()
    (tmp_path / "a-processor" / "made-up.json").write_text(json.dumps(stored({"strop": 2.0, "G": trl})))
    table, plot = report(tmp_path)
    assert f"| made-up | seconds | G | {trl / 2:.2f} | 3.00 | {met} |" in table
    assert "| dpo-lora-bf16-smol-uf | seconds | G | - | 3.20 | not measured |" in table
    assert "| made-up | strop | 16 | 2 | 3.000 (2.000 - 4.000) | - | 100 | 40 |" in table
    assert f"| {trl * 1.5:.3f} ({trl:.3f} - {2 * trl:.3f}) | {trl / 2:.2f} ({trl / 2:.2f} - {trl / 2:.2f}) |" in table
    assert plot.startswith("<svg") and f">{trl / 2:.2f}</text>" in plot


def test_machines_do_not_mix(tmp_path: Path) -> None:
    """Every machine has a section of its own; the plot is of the one with the most rounds."""
    for machine, names, seconds in (("fast", ("one",), 1.0), ("slow", ("one", "two"), 4.0)):
        (tmp_path / machine).mkdir()
        for name in names:
            result = stored({"strop": 2.0, "G": 2.0 * seconds})
            result["case"]["name"], result["machine"]["processor"] = name, f"{machine} processor"
            (tmp_path / machine / f"{name}.json").write_text(json.dumps(result))
    table, plot = report(tmp_path)
    slow, fast = table.split("## slow processor")[1].split("## fast processor")
    assert "| one | seconds | G | 4.00 |" in slow and "| two | seconds | G | 4.00 |" in slow
    assert "| one | seconds | G | 1.00 |" in fast and "| two |" not in fast and "not measured" not in fast
    assert ">4.00</text>" in plot and ">two</text>" in plot


def test_steps_beside_those_of_another_commit_are_reported(tmp_path: Path) -> None:
    """The ratio is that of the sums of least times, and quartiles are of the pairs."""
    pairs = [(1.0, 2.0), (3.0, 2.0), (1.5, 1.0), (1.0, 4.0)]
    figures = step_ratio.figures_of([1.0, 1.5], [2.0, 1.0], pairs)
    assert (figures["seconds"], figures["before"], figures["times"]) == (1.25, 1.5, 4)
    assert figures["ratio"] == pytest.approx(2.5 / 3) and figures["quartiles"] == [0.5, 1.5]
    found = [{"case": "toy", "rounds": 2, "start": figures, "step": figures}]
    (line, other) = step_ratio.lines(found)
    assert line.startswith("toy, step: 1.250 s, 1.500 s before; ratio 0.833; of 4 pairs") and "start" in other
    measured = {"commit": "b" * 40, "date": "2026-01-02"}
    for case in ("other", "toy"):
        step_ratio.store("a" * 40, [{**found[0], **measured, "case": case}], tmp_path / "steps.json")
    (tmp_path / "a-processor").mkdir()
    (tmp_path / "a-processor" / "made-up.json").write_text(json.dumps(stored({"strop": 2.0, "G": 4.0})))
    table, _ = report(tmp_path)
    assert "## Steps and starts beside those of commit aaaaaaa" in table
    for case in ("other", "toy"):
        figures = "1.250 | 1.500 | 0.833 | 1.000 (0.500 - 1.500)"
        assert f"| {case} | 2026-01-02 | bbbbbbb | step | 4 | {figures} |" in table


@pytest.mark.parametrize(("slower", "met"), [(2.0, "no"), (3.5, "yes")])
def test_grpo_beside_trl_is_reported_by_seed(slower: float, met: str) -> None:
    """Ratios are of runs with the same seed, and leave the first step out."""

    def run(side: str, seed: int, heldout: float, seconds: float) -> dict[str, Any]:
        steps = [100.0, seconds, seconds]
        return {"side": side, "seed": seed, "heldout": heldout, "busy_cores": 0.0, "rewards": [0.5] * 3} | {
            "wall": steps, "processor": steps, "sample": [0.0, seconds / 2, seconds / 2], "reward": [0.0] * 3,
            "train": [0.0, seconds / 4, seconds / 4],
        }  # fmt: skip

    runs = [run("trl", 1, 0.6, slower), run("strop", 2, 0.8, 2.0), run("strop", 1, 0.7, 1.0)]
    runs.append(run("trl", 2, 0.6, 2 * slower))
    settings = {"steps": 3, "prompts": 2, "turns": 0, "room": 4, "rate": 1e-3}
    machine = {"date": "2026-01-01", "processor": "a processor", "trl": "1"}
    found = {"settings": settings, "machine": machine, "commit": "a", "before": 0.4, "runs": runs}
    *_, ours, theirs = grpo.lines([found])
    assert ours == "| strop | 0.750 (0.115 - 1.385) | 0.700, 0.800 | 0.500 | 1.500 | - | - | 50 | 0 | 25 |"
    assert f"| {1.5 * slower:.3f} | {slower:.2f} ({slower:.2f} - {slower:.2f}) | {met} |" in theirs


def test_tokenising_beside_another_commit_is_reported() -> None:
    """Where that commit refused most rows there is no ratio."""
    new, old = ({"seconds": s, "rows": 300, "tokens": t} for s, t in ((2.0, 1010), (1.6, 1000)))
    found = [{"rows": "pref_mix-chatml", "new": new, "old": old, "ratios": [1.0, 1.25, 1.5], "ratio": 1.25}]
    found.append({"rows": "sft_toolcalls-qwen3", "new": new, "old": old | {"rows": 8}, "ratios": [40.0], "ratio": 40.0})
    head, _, read, refused = tokenising.table(found, "a" * 40)
    assert "those of aaaaaaa" in head
    assert read == "| 300 pairs | ChatML | 2.00 | 1.25 (1.00 - 1.50) | 1.010 |"
    assert refused == "| 300 conversations with tool calls | qwen3 | 2.00 | 292 rows refused then | |"


@pytest.mark.nightly
@pytest.mark.skipif(not tokenising.SHARED.is_dir(), reason="needs the rows of ../shared")
def test_two_trees_read_rows_in_turn() -> None:
    """This tree beside itself."""
    (rows,) = (rows for rows in tokenising.ROWS if rows.name == "sft_toolcalls-llama3_1")
    found = tokenising.compare((ROOT, ROOT), rows, rounds=1)
    assert found["new"]["rows"] == found["old"]["rows"] > 200
    assert found["new"]["tokens"] == found["old"]["tokens"] and found["ratio"] > 0


@pytest.mark.nightly
def test_two_trees_take_their_steps_in_turn() -> None:
    """This tree beside itself."""
    found = step_ratio.compare((ROOT, ROOT), replace(TOY, steps=4), rounds=1)
    assert found["step"]["times"] == 2 and found["start"]["times"] == 1
    assert all(found[what][side] > 0 for what in ("step", "start") for side in ("seconds", "before"))


def measured_alone(out: Path) -> None:
    run("benchmarks.measure", "--case", "toy", "--rounds", "1", "--threads", "1", "--out", str(out))


def measured_forked(out: Path) -> None:
    """Only one of the measurements, the one that needs torch alone, is made by a Python of its own."""
    alone = measure.call

    def call(module: str, *arguments: str, threads: int) -> str:
        if module == "flops":
            return alone(module, *arguments, threads=threads)
        return apart(_printed, module, arguments, threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STROP_TESTS_PRETEND")
        patch.setattr(measure, "call", call)
        words = ["measure", "--case", "toy", "--rounds", "1", "--threads", "1", "--out", str(out)]
        patch.setattr(sys, "argv", words)
        measure.main()


def _printed(module: str, arguments: Sequence[str], threads: int) -> str:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    sys.argv = [module, *arguments]
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    return printed.getvalue()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "measured", [measured_forked, pytest.param(measured_alone, marks=pytest.mark.nightly)], ids=lambda f: f.__name__
)
def test_the_harness_measures_its_smallest_case(measured: Callable[[Path], None], tmp_path: Path) -> None:
    measured(tmp_path)
    [path] = tmp_path.glob("*/toy.json")
    result = json.loads(path.read_text())
    [found] = result["rounds"]
    side = found["sides"]["strop"]
    assert side["seconds"] > 0 and side["reference_seconds"] > 0 and len(side["steps"]) == 3
    assert len(side["losses"]) == 3 and result["sharing_factor"] > 1
    table, _ = report(tmp_path)
    assert re.search(rf"\| toy \| strop \| 4 \| 1 \| {side['seconds']:.3f} ", table)
    assert found["predicted"]["mib"] > 60 and found["predicted"]["seconds"] > 0
    assert f"| toy | {found['predicted']['mib']:.0f} | {side['peak'] - side['start_mib']:.0f} | " in table


@pytest.mark.nightly
def test_its_sides_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    """Each run is asked whether it flushed denormal numbers, how it multiplied, in which dtype."""
    case = replace(TOY, bf16=True, sides=("denormal", "widened", "fp32"))
    run("benchmarks.inputs", str(tmp_path / "inputs"), json.dumps(case.as_dict()))
    for side in case.sides:
        run("benchmarks.sides", str(tmp_path / "inputs"), side, json.dumps(case.as_dict()))
        measured = json.loads((tmp_path / "inputs" / "measured.json").read_text(encoding="utf-8"))
        assert len(measured["losses"]) == case.steps and measured["scored_tokens"] > 0


def test_a_side_that_is_not_what_it_is_said_to_be_stops() -> None:
    if torch.set_flush_denormal(True):
        with pytest.raises(SystemExit, match="denormal: denormal numbers were flushed"):
            check_side("denormal", {})
    check_side("strop", {})
    with pytest.raises(SystemExit, match="widened: products were made otherwise"):
        check_side("widened", {"bfloat16 linear": "own"})
    with pytest.raises(SystemExit, match="fp32: the run computed in bfloat16"):
        check_side("fp32", {"bfloat16 linear": "own"})


def test_a_case_runs_once_though_float32_makes_two_one() -> None:
    names = [line.split(":")[0] for line in run("benchmarks.measure", "--list", "--fp32").splitlines()]
    assert "dpo-lora-fp32-smol-uf" in names and len(names) == len(set(names))
    assert not any("bf16" in name for name in names)


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    measure = importlib.import_module("benchmarks.measure")

    def core(name: str, family: int, model: int) -> str:
        return f"cpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\npower management:\n\n"

    assert measure.processor(core("AMD EPYC", 25, 1) * 2) == "AMD EPYC (family 25, model 1)"
    assert measure.processor(core("AMD EPYC", 26, 2)) == "AMD EPYC (family 26, model 2)"
    assert measure.processor(core("Xeon(R) Processor @ 2.50GHz", 6, 85)) == "Xeon(R) Processor @ 2.50GHz"
    assert measure.processor("Features : fp asimd\n") == platform.processor()  # as an ARM's
