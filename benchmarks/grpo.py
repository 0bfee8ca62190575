"""GRPO beside TRL's GRPOTrainer: a task learned from sampled completions, and the time of its steps.

    python -m benchmarks.grpo [--case short|long] [--seeds 1,2,3] [--folder FOLDER] [--out benchmarks/results]

Runs of other seeds that are stored with the same settings stay. The model that both start from is made anew, or once
in `--folder`, where later calls find it.

Cases differ in their prompts: of `short` each is a question of some ten tokens; in front of that of `long` stand 20
others with their answers, some 280 tokens. Prompts of people are longer, and a group shares its prompt.

Both sides have the same first weights, prompts in the same order, rewards, optimizer and steps, in float32 with one
thread, a process of its own for each run. What they sample differs, as their random numbers do. The task is the demo's:
sort a list of words, where only the whole sorted list is rewarded. The model is the demo's, of 283,000 weights, behind
its SFT stage, whose demonstrators mostly rush.

Held-out answers are greedy, by plain transformers on both sides. Times are of all steps but the first, collation,
logging and the process of the rewards included; processor seconds are what the process and its children used. TRL
samples with `generate`, as it does by default.

A profile of strop's step (cProfile, by processor time, 2026-11-29): a third is the forward passes of decoding, a third
the forward and backward pass of training, 8 % are lines of logs (written without a copy since), 7 % the rewards, 4 %
texts from tokens, 2 % random numbers. In both thirds it is the calls of a model this small that take the time, more
than its products. Before short completions shared tiles of attention, the step took 1.07 s instead of 0.59, half of it
in that attention.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from .inputs import ROOT
from .measure import busy_cores, call, commit, describe_machine

OUT = ROOT / "benchmarks" / "results"
SIZE = 8
"""Completions of each prompt."""
PHASES = ("sample", "reward", "train")
SIDES = {"strop": "strop", "trl": "TRL"}
MOST_OF_TIME = 1 / 3
"""Of TRL's time per step, strop takes at most this share."""
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95 % interval of a mean, by the number of values."""


@dataclass(frozen=True)
class Settings:
    """prompts: of each step. turns: questions with their answers in front of each. room: tokens of a completion at
    most. rate: of GRPO, constant. demonstrations, sft_rate, sft_epochs: of the SFT stage before it."""

    prompts: int = 32
    turns: int = 0
    steps: int = 20
    room: int = 10
    rate: float = 1e-4
    demonstrations: int = 10_000
    sft_rate: float = 2e-3
    sft_epochs: int = 4

    @property
    def prompt_room(self) -> int:
        """Tokens of a prompt at most."""
        return 32 + 32 * self.turns

    @property
    def length(self) -> int:
        """Tokens of a prompt and its completion at most."""
        return self.prompt_room + 32


SETTINGS = {"short": Settings(), "long": Settings(turns=20)}
FILES = {case: f"grpo-{case}.json" for case in SETTINGS}


# -- what both sides start from ---------------------------------------------------------------------------------------


def make(folder: Path, settings: Settings) -> None:
    """`folder` gets start/, the demo's data and held-out rows."""
    import strop
    from strop.demo.model import write_base
    from strop.demo.task import Size, write_data

    write_data(folder / "data", 0, Size(num_demonstrations=settings.demonstrations))
    put_turns_in_front(folder / "data", settings)
    base = folder / "base"
    write_base(base, 0)
    lengthen(base, settings)
    (result,) = strop.train(
        strop.load_config(
            overrides={
                "seed": 0,
                "models": [{"huggingface_id": str(base), "name": "sft"}],
                "dataset": {"train_file": str(folder / "data" / "sft.train.jsonl"), "validation_split": 0.0},
                "post_training": {"method": "sft"},
                "training": {
                    "output_dir": str(folder),
                    "num_epochs": settings.sft_epochs,
                    "groups_per_step": max(64 // (settings.turns + 1), 1),  # 64 answers
                    "learning_rate": settings.sft_rate,
                    "warmup_steps": 20,
                    "max_seq_length": settings.length,
                    "max_prompt_length": None,
                    "max_completion_length": None,
                    "bf16": False,
                    "save_steps": 10**6,
                },
                "finetuning": {"load_best_model_at_end": False, "early_stopping_patience": None},
            }
        )
    )
    result.final.rename(folder / "start")
    (folder / "before.json").write_text(json.dumps(heldout_accuracy(folder / "start", folder, settings)))


def put_turns_in_front(data: Path, settings: Settings) -> None:
    """Demonstrations become conversations of several; every question gets the same ones in front, all sorted."""
    from strop.demo.task import ITEMS, NUM_ITEMS, completion_of, prompt_of

    if not settings.turns:
        return
    shown = read(data / "sft.train.jsonl")
    joined = [shown[i : i + settings.turns + 1] for i in range(0, len(shown), settings.turns + 1)]
    write(
        data / "sft.train.jsonl", [{"messages": [turn for row in some for turn in row["messages"]]} for some in joined]
    )
    draw = random.Random(1)
    lists = [draw.sample(ITEMS, draw.choice(NUM_ITEMS)) for _ in range(settings.turns)]
    front = [turn for items in lists for turn in (*prompt_of(items), *completion_of(sorted(items)))]
    for name in ("grpo.train.jsonl", "heldout.jsonl"):
        write(data / name, [{**row, "prompt": front + row["prompt"]} for row in read(data / name)])


def lengthen(base: Path, settings: Settings) -> None:
    """The demo's model has as many positions as a prompt of this case needs; none of them has weights."""
    if not settings.turns:
        return
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        path = base / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: settings.length}))


def heldout_accuracy(model: Path, folder: Path, settings: Settings) -> float:
    """Share of the held-out lists that the model in `model` answers rightly, by greedy decoding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from strop.rewards.shipped import exact_match

    rows = read(folder / "data" / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    right = 0.0
    for at in range(0, len(rows), 100):
        some = rows[at : at + 100]
        inputs = tokenizer.apply_chat_template(
            [row["prompt"] for row in some],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            ids = policy.generate(**inputs, do_sample=False, max_new_tokens=settings.room)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(exact_match(texts, {"answer": [row["answer"] for row in some]}, column="answer"))
    return right / len(rows)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# -- one run ----------------------------------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Of this process and its living children."""
    import psutil

    own = psutil.Process()
    spent = [p.cpu_times() for p in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in spent)


class Clock:
    """When training began and when each step ended, in seconds of the wall and of the processor."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), processor_seconds()))

    def steps(self) -> dict[str, list[float]]:
        """By clock, seconds of each step."""
        return {name: [b[i] - a[i] for a, b in pairwise(self.marks)] for i, name in enumerate(("wall", "processor"))}


def by_strop(folder: Path, seed: int, out: Path, settings: Settings) -> dict[str, Any]:
    import strop
    from strop.engine.loop import Loop

    clock, step = Clock(), Loop.step

    def marked(loop: Loop, number: int) -> None:
        if not clock.marks:
            clock.mark()
        step(loop, number)
        clock.mark()

    Loop.step = marked  # type: ignore[method-assign]
    (result,) = strop.train(
        strop.load_config(
            overrides={
                "seed": seed,
                "models": [{"huggingface_id": str(folder / "start"), "name": "run"}],
                "dataset": {"train_file": str(folder / "data" / "grpo.train.jsonl"), "validation_split": 0.0},
                "post_training": {"method": "grpo", "algorithm": "grpo", "beta": 0.0},
                "rollout": {"num_generations": SIZE, "probe_prompts": 0},
                "rewards": [{"name": "exact_match", "settings": {"column": "answer"}}],
                "training": {
                    "output_dir": str(out),
                    "max_steps": settings.steps,
                    "groups_per_step": settings.prompts,
                    "learning_rate": settings.rate,
                    "lr_scheduler": "constant",
                    "warmup_steps": 0,
                    "weight_decay": 0.0,
                    "max_grad_norm": 1.0,
                    "max_seq_length": settings.length,
                    "max_prompt_length": settings.prompt_room,
                    "max_completion_length": settings.room,
                    "bf16": False,
                    "logging_steps": 1,
                    "save_steps": 10**6,
                },
                "finetuning": {"load_best_model_at_end": False, "early_stopping_patience": None},
            }
        )
    )
    records = [r for r in read(result.run_dir / "metrics.jsonl") if r["split"] == "train"]
    return {
        **clock.steps(),
        **{phase: [r[f"time/{phase}"] for r in records] for phase in PHASES},
        "rewards": [r["reward"] for r in records],
        "lengths": [r["completions/mean_length"] for r in records],
        "heldout": heldout_accuracy(result.final, folder, settings),
    }


def by_trl(folder: Path, seed: int, out: Path, settings: Settings) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    clock, phases = Clock(), defaultdict[str, list[float]](list)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            clock.mark()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock.mark()

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32),
        reward_funcs=[sorted_right],
        args=trl_settings(seed, out, settings),
        train_dataset=in_strops_order(folder, seed, settings),
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
        callbacks=[Watch()],
    )
    trainer._generate_single_turn = timed(trainer._generate_single_turn, phases["sample"])
    trainer._calculate_rewards = timed(trainer._calculate_rewards, phases["reward"])
    trainer.train()
    trainer.save_model(str(out / "final"))
    records = [r for r in trainer.state.log_history if "reward" in r]
    steps = clock.steps()
    phases["train"] = [a - b - c for a, b, c in zip(steps["wall"], phases["sample"], phases["reward"], strict=True)]
    return {
        **steps,
        **phases,
        "rewards": [r["reward"] for r in records],
        "lengths": [r["completions/mean_length"] for r in records],
        "heldout": heldout_accuracy(out / "final", folder, settings),
    }


def trl_settings(seed: int, out: Path, settings: Settings) -> Any:
    """TRL's configuration with what `by_strop` sets."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(out),
        seed=seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * SIZE,
        gradient_accumulation_steps=1,
        num_generations=SIZE,
        max_completion_length=settings.room,
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        learning_rate=settings.rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def in_strops_order(folder: Path, seed: int, settings: Settings) -> Any:
    """The prompts of all steps, as strop deals them, for a trainer that does not shuffle."""
    from datasets import Dataset

    from strop.plan.order import Plan

    rows = read(folder / "data" / "grpo.train.jsonl")
    plan = Plan.of(len(rows), settings.prompts, 1, settings.steps, seed)
    ordered = [rows[i] for step in range(1, settings.steps + 1) for i in plan.groups(step)]
    return Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in ordered])


def sorted_right(completions: Sequence[Sequence[Mapping[str, str]]], answer: Sequence[str], **_: Any) -> list[float]:
    """strop's `exact_match`, as TRL calls rewards."""
    from strop.rewards.shipped import exact_match

    return exact_match([turns[-1]["content"] for turns in completions], {"answer": answer}, column="answer")


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, which also notes how many seconds each call took."""

    def wrapped(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = call(*args, **options)
        seconds.append(time.perf_counter() - began)
        return found

    return wrapped


def run_side(folder: Path, side: str, seed: int, settings: Settings) -> dict[str, Any]:
    """One run; what it found."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        found = (by_strop if side == "strop" else by_trl)(folder, seed, Path(out), settings)
    for what in ("wall", *PHASES, "rewards"):
        if len(found[what]) != settings.steps:
            raise SystemExit(f"{side}: {what} of {len(found[what])} steps, not of {settings.steps}")
    return found


# -- all of them ------------------------------------------------------------------------------------------------------


def compare(case: str, seeds: Sequence[int], sides: Sequence[str], place: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="strop-bench-") as scratch:
        folder = place or Path(scratch, "made")
        os.environ["STROP_CACHE"] = f"{scratch}/cache"
        if not (folder / "before.json").exists():
            call("grpo", "--make", str(folder), "--case", case, threads=1)
        before = json.loads((folder / "before.json").read_text())
        print(f"held-out accuracy {before:.3f} before", flush=True)
        runs: list[dict[str, Any]] = []
        for seed in seeds:
            for side in sides if seed % 2 else tuple(reversed(sides)):
                busy = busy_cores()
                found_at = f"{scratch}/found.json"
                words = ("--case", case, "--sides", side, "--seeds", str(seed), "--out", found_at)
                call("grpo", "--run", str(folder), *words, threads=1)
                found = json.loads(Path(found_at).read_text())
                runs.append({"side": side, "seed": seed, "busy_cores": busy, **found})
                print(
                    f"seed {seed}: {side:5s} held-out accuracy {found['heldout']:.3f}; per step "
                    f"{per_step(runs[-1], 'processor'):.3f} s of the processor, {per_step(runs[-1], 'wall'):.3f} s",
                    flush=True,
                )
    return {
        "settings": asdict(SETTINGS[case]),
        "machine": describe_machine(),
        "commit": commit(),
        "before": before,
        "runs": runs,
    }


def store(result: dict[str, Any], path: Path) -> None:
    """Beside the runs of other seeds and sides with the same settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["side"], r["seed"]) for r in result["runs"]}
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if all(earlier.get(name) == result[name] for name in ("settings", "before")):
        result["runs"] += [r for r in earlier["runs"] if (r["side"], r["seed"]) not in done]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def per_step(run: Mapping[str, Any], what: str) -> float:
    """Mean seconds of a step, the first one left out."""
    return fmean(run[what][1:])


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Of the mean, 95 %, by Student's t."""
    half = T_975[len(numbers)] * stdev(numbers) / len(numbers) ** 0.5
    return fmean(numbers) - half, fmean(numbers) + half


def lines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For the page of results: what is measured, and a table for each case."""
    yield (
        f"`python -m benchmarks.grpo`: the demo's task, sorting lists of words, rewarded for the whole sorted list "
        f"alone; {SIZE} completions of each prompt at temperature 1, all weights, float32, one thread, no reference. "
        "Sides in turn, in processes of their own; what stands per seed is in the order of the seeds. Held-out: share "
        "of 400 lists that are answered rightly by greedy decoding, the mean over seeds and its 95 % interval. "
        "Processor seconds per step: the mean over seeds, of the process and the one that calls the rewards. Ratio: "
        "TRL's by strop's with the same seed, in brackets the least and the most; the target is "
        f"{1 / MOST_OF_TIME:.0f}. Phases: shares of the step by the wall; TRL's training is what is left of its step."
    )
    for result in results:
        yield from table(result)


def in_front(turns: int) -> str:
    return f"{turns} questions with their answers (some {14 * turns} tokens)" if turns else "nothing"


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """When and how it was measured, and a line per side."""
    s, machine = result["settings"], result["machine"]
    by_side: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in result["runs"]:
        by_side[run["side"]].append(run)
    for runs in by_side.values():
        runs.sort(key=lambda run: int(run["seed"]))
    busy = median(run["busy_cores"] or 0.0 for run in result["runs"])
    yield (
        f"\n{machine['date']}, {machine['processor']}, trl {machine['trl']}, commit "
        f"{result['commit']}; {s['steps']} steps of {s['prompts']} prompts, {in_front(s['turns'])} in front of each; "
        f"completions of at most {s['room']} tokens, "
        f"learning rate {s['rate']:g}. Held-out accuracy before: {result['before']:.3f}. Other processes kept "
        f"{busy:.1f} cores busy (median).\n"
    )
    phases = " | ".join(f"{phase}, %" for phase in PHASES)
    yield f"| side | held-out | per seed | reward, last 10 steps | processor s | ratio | met | {phases} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    own = by_side["strop"]
    for side, runs in sorted(by_side.items(), key=lambda item: list(SIDES).index(item[0])):
        scores = [run["heldout"] for run in runs]
        low, high = interval(scores) if len(scores) > 1 else (scores[0], scores[0])
        ratios = [per_step(a, "processor") / per_step(b, "processor") for a, b in zip(runs, own, strict=True)]
        against, met = "-", "-"
        if side != "strop":
            against = f"{fmean(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            met = "yes" if fmean(ratios) >= 1 / MOST_OF_TIME else "no"
        shares = (fmean(per_step(r, phase) / per_step(r, "wall") for r in runs) for phase in PHASES)
        yield (
            f"| {SIDES[side]} | {fmean(scores):.3f} ({low:.3f} - {high:.3f}) "
            f"| {', '.join(f'{x:.3f}' for x in scores)} | {fmean(fmean(r['rewards'][-10:]) for r in runs):.3f} "
            f"| {fmean(per_step(r, 'processor') for r in runs):.3f} | {against} | {met} "
            f"| {' | '.join(f'{100 * x:.0f}' for x in shares)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(SETTINGS), default="short")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    for hidden in ("--make", "--run"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.make:
        make(args.make, SETTINGS[args.case])
    elif args.run:
        found = run_side(args.run, args.sides[0], seeds[0], SETTINGS[args.case])
        args.out.write_text(json.dumps(found))
    else:
        found = compare(args.case, seeds, args.sides, args.folder)
        store(found, args.out / FILES[args.case])
        print("\n".join(table(found)))


if __name__ == "__main__":
    main()
