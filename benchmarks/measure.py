"""strop beside TRL: every case, its sides in turn, round after round, each measurement in a process of its own.

    python -m benchmarks.measure [--case NAME ...] [--rounds 3] [--fp32] [--wait-idle MINUTES] [--out FOLDER] [--list]

Figures go to benchmarks/results/PROCESSOR/NAME.json, so that those of two machines do not mix, and replace what stands
there: a quick look belongs elsewhere (--out). `python -m benchmarks.report` makes tables and a plot of them. This
process loads no framework and works only while it waits, so what it measures is alone where the machine is idle: the
processor time that others take is measured before each run and kept beside the result.

Seconds a pair: from the end of the last warm-up step to the end of the last step, by the pairs between, plus the
seconds of reference passes made ahead, by all pairs. Imports, loading and saving are in `wall` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from .cases import CASES, SIDES, TOY, Case
from .flops import needed_flops, sharing_factor
from .inputs import ROOT, missing
from .sides import CLOCK

RESULTS = Path(__file__).parent / "results"
IDLE_CORES = 0.3
"""An idle machine's processes take less than this together."""
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets")


def busy_cores(seconds: float = 1.0) -> float | None:
    """Processors that all processes kept busy over the next `seconds`; None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def used() -> tuple[int, int]:
        ticks = [int(n) for n in stat.read_text().splitlines()[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)

    before = used()
    time.sleep(seconds)
    busy, total = (b - a for a, b in zip(before, used(), strict=True))
    return (os.cpu_count() or 1) * busy / max(total, 1)


def look_at_machine(wait_minutes: float) -> dict[str, float | None]:
    """What else runs. Waits for an idle machine, as long as it is allowed to."""
    started, busy = time.monotonic(), busy_cores()
    while busy is not None and busy > IDLE_CORES and time.monotonic() - started < 60 * wait_minutes:
        busy = busy_cores(5.0)
    return {"busy_cores": busy, "load_average": os.getloadavg()[0], "waited": time.monotonic() - started}


def call(module: str, *arguments: str, threads: int) -> str:
    """Run a module of this package in a process of its own, offline, and return what it prints."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    env = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[1:2])}: {module} failed\n{done.stderr[-4000:]}")
    return done.stdout


def measure_side(folder: Path, case: Case, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One training of one side, with its derived figures."""
    machine = look_at_machine(args.wait_idle)
    started = time.perf_counter()
    call("sides", str(folder), side, json.dumps(case.as_dict()), threads=args.threads)
    wall = time.perf_counter() - started
    measured = json.loads((folder / "measured.json").read_text())
    marks = measured.pop("marks")
    ahead = measured["reference_seconds"] / case.num_rows
    return {
        **measured,
        "seconds": (marks[-1] - marks[case.warmup]) / case.num_measured + ahead,
        "steps": [b - a for a, b in pairwise(marks)],
        "wall": wall,
        "peak": measured["peak_mib"],
        "machine": machine,
    }


def check_same_work(case: Case, rounds: list[dict[str, Any]]) -> None:
    """Every side was asked for the same number of log-probs."""
    counts = {side: measured["scored_tokens"] for found in rounds for side, measured in found["sides"].items()}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"{case.name}: the sides scored different tokens: {counts}")


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one case, as it is stored."""
    with tempfile.TemporaryDirectory(prefix="strop-bench-") as place:
        folder = Path(place) / "inputs"
        call("inputs", str(folder), json.dumps(case.as_dict()), threads=args.threads)
        facts = json.loads((folder / "facts.json").read_text())
        rounds: list[dict[str, Any]] = []
        for number in range(1, args.rounds + 1):
            found: dict[str, Any] = {"matmul": json.loads(call("flops", threads=args.threads)), "sides": {}}
            if "strop" in case.sides and case.method != "group":
                asked = (str(folder), json.dumps(case.as_dict()))
                found["predicted"] = json.loads(call("predict", *asked, threads=args.threads))
            # every second round backwards, so that no side is always the one behind a heavy other
            for side in case.sides if number % 2 else tuple(reversed(case.sides)):
                figures = measure_side(folder, case, side, args)
                found["sides"][side] = figures
                print(
                    f"{case.name}, round {number}: {side:5s} {figures['seconds']:8.3f} s a {case.unit}, "
                    f"peak {figures['peak']:6.0f} MiB, wall {figures['wall']:6.1f} s; "
                    f"others kept {figures['machine']['busy_cores'] or 0:.1f} cores busy",
                    flush=True,
                )
            rounds.append(found)
        check_same_work(case, rounds)
    measured_rows = facts["lengths"][case.warmup * case.batch :]
    return {
        "case": case.as_dict(),
        "threads": args.threads,
        "clock": os.environ.get(CLOCK, "wall"),
        "machine": describe_machine(),
        "commit": commit(),
        "needed_flops": needed_flops(case, facts["config"], measured_rows) / case.num_measured,
        "sharing_factor": sharing_factor(facts["lengths"]),
        "rounds": rounds,
    }


def commit() -> str | None:
    """What was measured; None outside a repository."""
    if shutil.which("git") is None:
        return None

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = ask("status", "--porcelain", "--", "src", "benchmarks/*.py")  # not the results, which this writes
    head = ask("rev-parse", "--short", "HEAD")
    return f"{head}{'-dirty' if changed else ''}" if head else None


def processor(cpuinfo: str) -> str:
    """The processor by its name, and by family and model where its name has no number: virtual machines call
    processors of several generations by one name."""
    first = dict(re.findall(r"^(.+?)[ \t]*: *(.*?) *$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    name = first.get("model name") or platform.processor()
    known = [f"{key} {first[of]}" for key, of in (("family", "cpu family"), ("model", "model")) if of in first]
    return name if re.search(r"\d", name) or not known else f"{name} ({', '.join(known)})"


def describe_machine() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo")
    versions = {name: version(name) for name in PACKAGES}
    return {
        "processor": processor(cpus.read_text()) if cpus.exists() else platform.processor(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        **versions,
    }


def store(result: dict[str, Any], folder: Path) -> Path:
    processor = re.sub(r"\((r|tm)\)", "", result["machine"]["processor"].lower())
    path = folder / re.sub(r"[^a-z0-9.]+", "-", processor).strip("-") / f"{result['case']['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {**CASES, TOY.name: TOY}
    parser.add_argument("--case", nargs="+", choices=sorted(known), default=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--pairs", type=positive, help="measure at least so many pairs instead of the case's own number"
    )
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="float32 instead of bfloat16, for processors that only emulate it; the case's name says so",
    )
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="these sides instead of the case's own")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument(
        "--wait-idle",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="before each measurement, wait up to so long for an idle machine",
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="time steps by the seconds of the processor, where others use the machine, too; not for reference passes",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    args = parser.parse_args(argv)
    cases = (asked_for(known[name], args) for name in args.case)
    args.cases = list({case.name: case for case in cases}.values())  # in float32 two may become one
    return args


def asked_for(case: Case, args: argparse.Namespace) -> Case:
    """The case as the command line changes it."""
    if args.fp32:
        case = case.in_float32()
    if args.pairs:
        case = case.with_rows(args.pairs)
    return replace(case, sides=tuple(args.sides)) if args.sides else case


def main() -> None:
    args = parse()
    if args.processor_time:
        os.environ[CLOCK] = "processor"
    for case in args.cases:
        if args.list:
            print(f"{case.name}: {', '.join(case.sides)}")
            continue
        if (reason := missing(case)) is not None:
            print(f"{case.name}: skipped, it {reason}", flush=True)
            continue
        print(f"{case.name}: stored in {store(run_case(case, args), args.out)}", flush=True)


if __name__ == "__main__":
    main()
