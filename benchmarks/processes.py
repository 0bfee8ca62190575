"""Several processes on this machine: what they send each other in a step, and one process beside two.

    python -m benchmarks.processes [--out benchmarks/results/processes.json] [--rounds 3]

bytes      a model of 12 million weights trains in 2 and in 4 processes (gloo). Every call of torch.distributed is
           counted with the bytes that a process sends in it by a ring algorithm, from the second step on. The least is
           what summing the gradients alone takes: 2 n (p - 1) / p of n bytes over p processes.
threads    the same run in one process of two threads and in two processes of one thread, in turn: seconds per step,
           medians of the steps, the least of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .inputs import ROOT, SHARED

if TYPE_CHECKING:
    from strop.policy.model.from_config import Shape

OUT = ROOT / "benchmarks" / "results" / "processes.json"
MODEL = SHARED / "models" / "base-12m"
ROWS = SHARED / "data" / "hh_helpful.train.jsonl"
TRAINED: Mapping[str, Mapping[str, Any]] = {
    "full": {"lora.enabled": False},
    "LoRA": {"lora.enabled": True, "lora.r": 16},
}
KEYS: Mapping[str, Any] = {
    "models.0.name": "run",
    "models.0.huggingface_id": str(MODEL),
    "dataset.train_file": str(ROWS),
    "dataset.validation_split": 0.0,
    "dataset.max_samples": 200,
    "post_training.method": "dpo",
    "training.max_seq_length": 256,
    "training.groups_per_step": 8,
    "training.logging_steps": 1,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-4,
    "training.save_steps": 1000,
    "finetuning.load_best_model_at_end": False,
}
BYTES_STEPS, THREADS_STEPS = 4, 10
COUNTED: Mapping[str, Callable[[int, int], float]] = {
    "all_reduce": lambda size, count: 2 * size * (count - 1) / count,
    "all_gather": lambda size, count: size * (count - 1),
    "all_gather_single": lambda size, count: size * (count - 1),
    "reduce_scatter_single": lambda size, count: size * (count - 1) / count,
    "broadcast": lambda size, count: size,
}
"""Call -> the bytes that a process sends, by those of its input and the number of processes. Of a broadcast, the most
that a process passes on."""


def worker(folder: Path) -> None:
    """One process: trains, and writes the bytes and the seconds of every step."""
    import torch.distributed as dist

    import strop
    from strop.engine.loop import Loop

    sent = 0.0
    steps: list[float] = []

    def counted(name: str) -> None:
        real = getattr(dist, name)

        def call(*args: Any, **named: Any) -> Any:
            nonlocal sent
            given = named.get("input_tensor", named.get("input", named.get("tensor")))
            if given is None:
                given = args[1] if name.startswith(("all_gather", "reduce_scatter")) else args[0]
            sent += COUNTED[name](given.nbytes, dist.get_world_size(named.get("group")))
            return real(*args, **named)

        setattr(dist, name, call)

    for name in COUNTED:
        counted(name)
    step = Loop.step

    def stepping(loop: Loop, number: int) -> None:
        nonlocal sent
        sent = 0.0
        step(loop, number)
        steps.append(sent)

    Loop.step = stepping  # type: ignore[method-assign]
    (result,) = strop.train(str(folder / "config.yaml"))
    if int(os.environ.get("RANK", "0")) == 0:
        lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines if line["split"] == "train"]
        found = {"sent": steps, "seconds": [b - a for a, b in pairwise(seconds)]}
        (folder / "found.json").write_text(json.dumps(found))


def trained(keys: Mapping[str, Any], num_processes: int, threads: int) -> dict[str, list[float]]:
    """What the worker of rank 0 found."""
    from strop.config import load_config, to_yaml

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config = load_config(overrides={**KEYS, "training.output_dir": str(folder / "out"), **keys})
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command += ["-m", "benchmarks.processes", "--worker", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "STROP_CACHE": str(folder / "cache")}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found: dict[str, list[float]] = json.loads((folder / "found.json").read_text())
        return found


def strategies() -> Iterator[tuple[str, dict[str, Any], int]]:
    """Name, keys and number of processes of each way to lie on several devices."""
    for count in (2, 4):
        yield f"a copy in each of {count}", {}, count
    yield "sharded over 2 (fsdp)", {"gpu.fsdp": True}, 2
    yield "sharded over 2 of 4 (fsdp)", {"gpu.fsdp": True, "gpu.shard_size": 2}, 4


def sent_bytes() -> Iterator[dict[str, Any]]:
    for kind, keys in TRAINED.items():
        gradients = _gradient_bytes(keys)
        for name, how, count in strategies():
            found = trained({**keys, **how, "training.max_steps": BYTES_STEPS}, count, 1)
            least = COUNTED["all_reduce"](gradients, count)
            yield {"trains": kind, "strategy": name, "sent": median(found["sent"][1:]), "least": least}


def _shape(keys: Mapping[str, Any]) -> Shape:
    from strop.config import load_config
    from strop.policy.model.from_config import shape_of

    config = load_config(overrides={**KEYS, **keys})
    return shape_of(config.lora, config.models[0])


def _gradient_bytes(keys: Mapping[str, Any]) -> int:
    shape = _shape(keys)
    return 4 * (shape.adapters or shape.matrix + shape.others)


def threads(rounds: int) -> Iterator[dict[str, Any]]:
    for kind, keys in TRAINED.items():
        keys = {**keys, "training.max_steps": THREADS_STEPS}
        sides: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(rounds):
            sides["one"].append(median(trained(keys, 1, 2)["seconds"]))
            sides["two"].append(median(trained(keys, 2, 1)["seconds"]))
        one, two = min(sides["one"]), min(sides["two"])
        ratios = [a / b for a, b in zip(sides["one"], sides["two"], strict=True)]
        yield {"trains": kind, "one": one, "two": two, "ratios": ratios, "rounds": rounds}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For the page of results."""
    yield (
        f"{found['date']}, {found['processor']}, commit {found['commit'][:7]}. DPO on hh_helpful, a model of 12 "
        "million weights, float32, 8 pairs per step. MB that each process sends per step, beside what summing the "
        "gradients takes at least:"
    )
    yield ""
    yield "| trains | strategy | sent, MB | least, MB | ratio |"
    yield "|---|---|---|---|---|"
    for row in found["bytes"]:
        sent, least = row["sent"] / 1e6, row["least"] / 1e6
        yield f"| {row['trains']} | {row['strategy']} | {sent:.3f} | {least:.3f} | {sent / least:.3f} |"
    if not found["threads"]:
        return
    yield ""
    yield (
        "One process of two threads beside two processes of one thread, in turn; seconds per step, and the ratios of "
        "the rounds:"
    )
    yield ""
    yield "| trains | one process | two processes | one / two | rounds |"
    yield "|---|---|---|---|---|"
    for row in found["threads"]:
        ratios = sorted(row["ratios"])
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        yield f"| {row['trains']} | {row['one']:.3f} | {row['two']:.3f} | {spread} | {row['rounds']} |"


def main() -> None:
    from strop.machine import processor_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=3, help="of one process beside two; 0: they are not measured")
    asked = parser.parse_args()
    if asked.worker is not None:
        worker(asked.worker)
        return
    shape = _shape(TRAINED["LoRA"])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    found = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "processor": processor_model(),
        "model": {name: getattr(shape, name) for name in ("matrix", "others", "layers", "adapters")},
        "bytes": list(sent_bytes()),
        "threads": list(threads(asked.rounds)) if asked.rounds else [],
    }
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
