"""Seconds and memory of a start on many cached rows: from the configuration to the first step's micro-batches.

    python -m benchmarks.startup [--rows 1000000] [--against COMMIT]

The rows are made up here and put into the token cache, so that nothing is tokenised; the model is tiny and is not
loaded. What is left is what grows with the rows: reading their lengths, the report, the split, the plan, the estimate.
Memory is anonymous memory alone (Linux), which leaves out pages of files. That of a start on a thousand rows is taken
off. Under `--against` the code of COMMIT runs on the same rows; it has to have the rooms that are imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FEW = 1000
ROWS_A_BATCH = 8192


def _made_up(rows: int) -> Iterator[tuple[str, Any]]:
    """Pairs of short completions, as a source that has been tokenised gives them."""
    import random
    from array import array

    from strop.data.store.row_pipeline import PipelineResult
    from strop.data.store.table import Record, to_table
    from strop.types import Completion, Group, Origin

    draw = random.Random(0)

    def ids(least: int, most: int) -> array[int]:
        return array("i", draw.choices(range(3, 90), k=draw.randint(least, most)))

    def group(line: int) -> Group:
        sides = (ids(2, 14), ids(2, 14))
        return Group(ids(4, 20), tuple(Completion(side, b"\1" * len(side)) for side in sides), Origin("rows", line))

    for start in range(0, rows, ROWS_A_BATCH):
        lines = range(start, min(start + ROWS_A_BATCH, rows))
        records = [Record(group(line), 0, b"%d" % line) for line in lines]
        yield "rows", PipelineResult(num_good=len(records), table=to_table(records))


def _overrides(folder: Path) -> dict[str, Any]:
    return {
        "models.0.name": "run",
        "models.0.huggingface_id": str(folder / "shared"),
        "dataset.train_file": str(folder / "pairs.jsonl"),
        "post_training.method": "dpo",
        "training.output_dir": str(folder / "out"),
        "training.max_seq_length": 64,
    }


def fill(folder: Path, rows: int) -> None:
    """Put the rows into the token cache, in place of those of the file."""
    from strop.config import load_config, resolve
    from strop.data import load
    from strop.prepared import prepare

    load.work_all = lambda *_, **__: _made_up(rows)
    config = resolve(load_config(overrides=_overrides(folder)))
    prepare(config, config.models[0])


class _Memory:
    """Anonymous memory of this process: now, and the most since this was made."""

    def __init__(self) -> None:
        self.peak = self.before = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self.now())

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())  # a start on a few rows ends between two looks


def start(folder: Path) -> dict[str, float]:
    """A start on the cached rows; its seconds and bytes."""
    import torch

    from strop.config import load_config, resolve
    from strop.estimate import fitted, planned_rows, prediction, with_precision
    from strop.machine import machine_of
    from strop.plan.cutting import cut
    from strop.policy.precision import resolve_precision
    from strop.prepared import prepare

    try:
        from strop.run_description import describe
    except ImportError:  # commits that had it as a method

        def describe(run: Any, tokens: Any) -> Any:
            return run.describe(tokens)

    config = resolve(load_config(overrides=_overrides(folder)))
    model, device = config.models[0], torch.device("cpu")
    machine, tokens = machine_of(device), planned_rows(config.models[0])
    memory, began = _Memory(), time.perf_counter()
    prepared = prepare(config, model)
    seconds = {"read": time.perf_counter() - began}
    list(prepared.data.report.lines())
    prepared.advice()
    prepared = with_precision(prepared, machine, resolve_precision(prepared.config.training, device), tokens)
    precision = resolve_precision(prepared.config.training, device)
    settled = fitted(prepared, machine, precision, tokens)
    prediction(settled, machine, precision, tokens)
    list(describe(settled, tokens))
    budget = settled.config.training.micro_batch_tokens
    cut(settled.data.train, settled.plan.groups(1), budget, tokens)
    seconds["all"] = time.perf_counter() - began
    held = memory.now() - memory.before
    memory.stop()
    return {**seconds, "held": held, "peak": memory.peak - memory.before}


def _child(source: Path, work: Path, rows: int, *what: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": f"{source / 'src'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "STROP_CACHE": str(work / f"cache-{rows}"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--folder", str(work), "--rows", str(rows), *what]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=work, text=True).stdout


def measured(source: Path, work: Path, rows: int, times: int) -> dict[str, float]:
    """The fastest of some starts on so many rows, and its memory for each row beside that of a start on a few.

    The first start of all also measures the processor; it counts for neither.
    """

    def fastest(n: int) -> dict[str, float]:
        _child(source, work, n, "--fill")
        found = [json.loads(_child(source, work, n, "--start").splitlines()[-1]) for _ in range(1 + times)]
        return min(found[1:], key=lambda one: float(one["all"]))

    few, best = fastest(FEW), fastest(rows)
    per_row = {name: (best[name] - few[name]) / (rows - FEW) for name in ("held", "peak")}
    return {"read": best["read"], "all": best["all"], "few": few["all"], **per_row}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=2, help="starts, of which the fastest counts")
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(args.folder, args.rows)
        return 0
    if args.start:
        print("\n" + json.dumps(start(args.folder)))
        return 0
    from benchmarks.golden import checked_out, write_inputs

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_inputs(work)
        found = {"this tree": measured(ROOT, work, args.rows, args.times)}
        if args.against:
            with checked_out(args.against) as tree:
                found[args.against] = measured(tree, work, args.rows, args.times)
    for name, numbers in found.items():
        print(
            f"{name}: {numbers['all']:.2f} s for {args.rows:,} rows ({numbers['read']:.2f} s of it to read them; "
            f"{numbers['few']:.2f} s for {FEW:,}), {numbers['held']:.0f} bytes of memory kept per row, "
            f"{numbers['peak']:.0f} at the most"
        )
    if args.against:
        now, before = found["this tree"]["all"], found[args.against]["all"]
        print(f"ratio of seconds: {now / before:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
