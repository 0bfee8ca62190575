"""The processor time of steps and of starts, this tree by another commit, in turn.

    python -m benchmarks.step_ratio --against COMMIT [--case NAME ...] [--rounds 3] [--out FILE]

Both trees train the same rows of the same model, each in a process of its own with one thread. One process takes a step
while the other waits, then the other does, in changing order: what else the machine does meets both alike. Figures are
processor time, which other processes do not count in, though they slow memory and caches down for all. A step is what
lies between two of its beginnings: batches, passes, update, log. The start of a process ends where its first step
begins: imports, rows, the model, the reference.

Of each step the least time of the rounds counts on either side; a ratio is that of the sums. `start` is a case of
starts alone, of a model and rows as small as the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from .cases import CASES, TOY, Case
from .golden import checked_out
from .inputs import ROOT, missing

DEFAULT = ("dpo-lora-bf16-smol-uf", "dpo-lora-fp32-tiny-hh", "real-instruct_sft-tiny", "start")
MOST = 1.02
"""What the ratio of a case may come to."""
MARK = "@step "
"""Begins the lines that a side answers in; others are the run's own."""
START = replace(TOY, name="start", batch=32, steps=2)


def train(folder: Path, out: Path, case: Case) -> None:
    """A side: train, and wait for a line on standard input before each step."""
    import time

    from strop.engine.loop import Loop

    from .sides import strop_config

    step, began = Loop.step, 0.0

    def say(**what: float) -> None:
        print(MARK + json.dumps(what), flush=True)

    def waiting(loop: Loop, number: int) -> None:
        nonlocal began
        say(start=time.process_time()) if number == 1 else say(step=time.process_time() - began)
        sys.stdin.readline()
        began = time.process_time()
        step(loop, number)

    import strop

    Loop.step = waiting  # type: ignore[method-assign]
    strop.train(strop_config(folder, case, out))


class Side:
    """A process that trains with the code of one tree."""

    def __init__(self, tree: Path, work: Path, inputs: Path, out: Path, case: Case) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{tree / 'src'}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "STROP_CACHE": str(work / "cache"),  # one way to compute products for both
            "HF_HUB_OFFLINE": "1",
        }
        what = ["--train", str(inputs), "--to", str(out), "--as", json.dumps(case.as_dict())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_ratio", *what],
            env=environment,
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.out = out
        self.start = self._answer()["start"]

    def step(self) -> float:
        """Seconds of processor time of the next step."""
        self._go()
        return self._answer()["step"]

    def finish(self) -> dict[str, Any]:
        """Let it end. How it computed products."""
        self._go()
        self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"{self.out}: exit code {self._process.returncode}")
        (found,) = self.out.glob("*/environment.json")
        ways: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))["products"]
        return ways

    def stop(self) -> None:
        """End it where it has not ended."""
        self._process.kill()
        self._process.wait()

    def _go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, float] = json.loads(line.removeprefix(MARK))
                return found
        raise SystemExit(f"{self.out}: ended before its time")


def one_round(trees: Sequence[Path], work: Path, inputs: Path, case: Case, number: int) -> tuple[list[float], ...]:
    """For each tree the start and the steps after the warm-up, in seconds; number: of the round, from 0."""
    with ExitStack() as running:
        order = [0, 1] if number % 2 == 0 else [1, 0]
        sides: dict[int, Side] = {}
        for n in order:
            sides[n] = Side(trees[n], work, inputs, work / f"out-{number}-{n}", case)
            running.callback(sides[n].stop)
        found = [[sides[n].start] for n in (0, 1)]
        for step in range(1, case.steps):
            for n in order if step % 2 == 0 else order[::-1]:
                seconds = sides[n].step()
                if step > case.warmup:
                    found[n].append(seconds)
        ways = [sides[n].finish() for n in (0, 1)]
        if ways[0] != ways[1]:
            raise SystemExit(f"{case.name}: products were made in two ways: {ways}")
    return tuple(found)


def compare(trees: Sequence[Path], case: Case, rounds: int) -> dict[str, Any]:
    """The figures of one case; trees: this one and the other."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = [sys.executable, "-m", "benchmarks.inputs", str(work / "inputs"), json.dumps(case.as_dict())]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=True)
        found = [one_round(trees, work, work / "inputs", case, n) for n in range(rounds)]
    new, old = ([min(times) for times in zip(*side, strict=True)] for side in zip(*found, strict=True))
    result = {"start": figures_of(new[:1], old[:1], [(a[0], b[0]) for a, b in found])}
    if len(new) > 1:
        pairs = [pair for a, b in found for pair in zip(a[1:], b[1:], strict=True)]
        result["step"] = figures_of(new[1:], old[1:], pairs)
    return {"case": case.name, "rounds": rounds, **result}


def figures_of(new: Sequence[float], old: Sequence[float], pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """pairs: (new, old) of every time that was taken."""
    ratios = sorted(a / b for a, b in pairs)
    return {
        "seconds": sum(new) / len(new),
        "before": sum(old) / len(old),
        "ratio": sum(new) / sum(old),
        "median": median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "times": len(ratios),
    }


def store(against: str, found: Sequence[dict[str, Any]], path: Path) -> None:
    """Beside the cases that are stored already, where they are compared with the same commit."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cases = before["cases"] if before.get("against") == against else []
    by_name = {result["case"]: result for result in (*cases, *found)}
    path.write_text(json.dumps({"against": against, "cases": list(by_name.values())}, indent=1) + "\n", "utf-8")


def lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The figures for a person."""
    for result in found:
        for what in ("step", "start"):
            if (figures := result.get(what)) is not None:
                yield (
                    f"{result['case']}, {what}: {figures['seconds']:.3f} s, {figures['before']:.3f} s before; ratio "
                    f"{figures['ratio']:.3f}; of {figures['times']} pairs {figures['median']:.3f} "
                    f"(quartiles {figures['quartiles'][0]:.3f} - {figures['quartiles'][1]:.3f})"
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--case", nargs="+", default=DEFAULT, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="2 or more: the first start measures the processor")
    parser.add_argument("--steps", type=int, help="of each round, the warm-up included")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON: benchmarks/results/steps.json")
    for hidden in ("--train", "--to"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--as", dest="as_", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.to, Case.of(json.loads(args.as_)))
        return 0
    if not args.against:
        parser.error("--against is missing")
    known, found = {**CASES, TOY.name: TOY, START.name: START}, []
    ours = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    facts = {"commit": ours.stdout.strip(), "date": date.today().isoformat()}
    with checked_out(args.against) as tree:
        for name in args.case:
            case = known[name] if args.steps is None or name == START.name else replace(known[name], steps=args.steps)
            if why := missing(case):
                print(f"{name}: {why}")
                continue
            found.append({**compare((ROOT, tree), case, args.rounds), **facts})
            print(*lines(found[-1:]), sep="\n", flush=True)
            if args.out:
                store(args.against, found, args.out)
    slow = [r["case"] for r in found if max(r[what]["ratio"] for what in ("step", "start") if what in r) > MOST]
    print(f"above {MOST}: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
