"""The report of a run of a million steps: its time, its memory and the size of its page.

    python -m benchmarks.long_run [--steps 1000000] [--out benchmarks/results/long-run.json]

A short run is trained here, by a tiny model; its logs are then lengthened to `--steps` steps, every one of them logged,
an evaluation at every hundredth, and the margins of each in a log. `strop report` reads that folder in a process of its
own, with one thread.

Where the time goes, by cProfile: 59 % in pyarrow's parser of JSON, 11 % in cutting the file into blocks, 10 % in
imports, 8 % in the look whether lines are flat, 5 % in making the page. Two thirds of the parser's time make numbers of
the 21 columns that are read, of a line's 27. Lines of the same keys read as a table by pyarrow's parser of CSV, with
the keys compared in the bytes, took as long.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .inputs import ROOT
from .measure import RESULTS, commit
from .scenarios import Scenario, trained, write_models

FILE = "long-run.json"
EVALUATED = 100
"""Steps from one evaluation to the next."""
DRAWN = 2000
"""Steps whose margins there are: as many as a report reads."""


@dataclass(frozen=True)
class Measured:
    """seconds: of the processor, of all threads. wall: as a person waits. memory: bytes, resident at its peak."""

    steps: int
    log_bytes: int
    seconds: float
    wall: float
    memory: int
    page_bytes: int


def lengthen(run: Path, steps: int) -> None:
    """The logs of a run, drawn out to so many steps. Losses and norms scatter, so that no line is like another."""
    from strop.runfiles import MARGINS_LOG, margins_array

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of = {split: [line for line in lines if line["split"] == split] for split in ("train", "eval")}
    draw = random.Random(0)

    def later(line: dict[str, Any], step: int) -> str:
        scattered = {name: line[name] * draw.uniform(0.8, 1.2) for name in ("loss", "grad_norm") if name in line}
        return json.dumps({**line, **scattered, "step": step, "epoch": 2 * step / steps}) + "\n"

    def logged() -> Iterator[str]:
        yield later(of["eval"][0], 0)
        for step in range(1, steps + 1):
            yield later(of["train"][step * len(of["train"]) // (steps + 1)], step)
            if step % EVALUATED == 0:
                yield later(of["eval"][step * len(of["eval"]) // (steps + 1)], step)

    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(logged())
    margins = run / "logs" / "margins"
    there = sorted(margins.rglob("*.npy"))
    with (margins / MARGINS_LOG).open("w") as file:
        for place in range(steps):
            record = {"epoch": 0, "step": place, "global_step": place + 1, "mean": draw.random()}
            file.write(json.dumps({**record, "npy": margins_array(0, place)}) + "\n")
    for place in range(0, steps, max(1, steps // DRAWN)):
        target = margins / margins_array(0, place)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(there[place * len(there) // steps], target)


REPORT = """
import sys, time
from strop.cli import main
code = main(["report", sys.argv[1]])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("used", time.process_time(), peak)
sys.exit(code)
"""
"""`strop report`, and what it took. VmHWM and not ru_maxrss, which begins at the size of the process that starts it."""


def measured(run: Path, steps: int) -> Measured:
    """`strop report` on this folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    began = time.perf_counter()
    told = subprocess.check_output([sys.executable, "-c", REPORT, str(run)], env=environment, text=True)
    wall = time.perf_counter() - began
    seconds, kib = (float(word) for word in told.splitlines()[-1].split()[1:])
    sizes = [(run / name).stat().st_size for name in ("metrics.jsonl", "report.html")]
    return Measured(steps, sizes[0], seconds, wall, int(kib * 1024), sizes[1])


def made_and_measured(steps: int) -> Measured:
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_models(Path())
        run = trained(Scenario("long", "dpo", keys={"training.max_steps": 40}), Path()).absolute()
        lengthen(run, steps)
        return measured(run, steps)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, for RESULTS.md."""
    yield (
        f"{found['date']}, commit {found['commit']}, `python -m benchmarks.long_run`. `strop report` of a run of DPO, "
        f"every step logged, an evaluation at every {EVALUATED}th step, one thread. The target is 10 s and 500 MiB.\n"
    )
    yield "| steps logged | metrics.jsonl | processor time | wall time | memory at its peak | page |"
    yield "|---|---|---|---|---|---|"
    yield (
        f"| {found['steps']:,} | {found['log_bytes'] / 1e6:,.0f} MB | {found['seconds']:.1f} s | {found['wall']:.1f} s "
        f"| {found['memory'] / 2**20:,.0f} MiB | {found['page_bytes'] / 1e3:,.0f} kB |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS / FILE)
    options = parser.parse_args(arguments)
    found = made_and_measured(options.steps)
    print(found)
    stored = {"date": datetime.date.today().isoformat(), "commit": commit(), **asdict(found)}
    options.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
