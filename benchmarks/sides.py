"""One side of one case, trained once in a process of its own.

    python -m benchmarks.sides FOLDER SIDE CASE_AS_JSON

Writes FOLDER/measured.json: when training began and when each step ended, seconds of reference passes, tokens, losses,
memory. A clock mark is taken at the same place on both sides: at the end of a step, everything between two steps
(collation, logging) inside.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.machine import resident

from .cases import GROUP, Case
from .inputs import SEED

if TYPE_CHECKING:
    from strop.types import Group

LEARNING_RATE = 1e-5
CLOCK = "STROP_BENCH_CLOCK"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""What steps are timed by, as that variable of the environment says."""


@dataclass
class Measured:
    """Seconds on one clock; tokens over all steps, warm-up included. fed: what the model computed, padding included.
    start, base: memory with nothing but imports, and at the first step."""

    marks: list[float] = field(default_factory=list)
    reference_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    scored_tokens: int = 0
    real_tokens: int = 0
    fed_tokens: int = 0
    head_rows: int = 0
    start_mib: float = 0.0
    base_mib: float = 0.0
    peak_mib: float = 0.0

    def mark(self) -> None:
        self.marks.append(CLOCKS[os.environ.get(CLOCK, "wall")]())

    def begin(self) -> None:
        self.mark()
        self.base_mib = mib("VmRSS")


def mib(name: str) -> float:
    """Of this process: VmRSS now; VmHWM at its highest."""
    return resident(name) / 2**20


def timed(call: Callable[..., Any], measured: Measured) -> Callable[..., Any]:
    """`call`, its seconds added to those of the reference."""

    def wrapped(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, **options)
        measured.reference_seconds += time.perf_counter() - started
        return result

    return wrapped


# -- strop ------------------------------------------------------------------------------------------------------------


OURS = ("strop", "denormal", "widened", "fp32")
"""Sides that are trained by `strop.train`."""


def strop_config(folder: Path, case: Case, out: Path, *, plain: bool = False) -> Any:
    import strop

    training: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "max_seq_length": case.max_length,
        "max_prompt_length": None,
        "max_completion_length": None,
        "logging_steps": 1,
        "bf16": case.bf16,
    }
    if case.whole_micro_batch:
        training["micro_batch_tokens"] = 4 * case.batch * case.max_length
    model = {"huggingface_id": str(folder / "model")}
    model |= {"adapter": str(folder / "adapter")} if case.lora else {}
    model |= {"attn_implementation": "sdpa"} if plain else {}
    return strop.load_config(
        overrides={
            "seed": SEED,
            "models": [model],
            "dataset": {
                "train_file": str(folder / "rows.strop.jsonl"),
                "validation_split": 0.0,
                "render": "chat" if case.is_real else "raw",
            },
            "post_training": {"method": "sft" if case.method == "sft" else "dpo"},
            "training": training,
            **({"lora": {"lora_dropout": 0.0}} if case.lora else {}),
        }
    )


def strop_side(folder: Path, case: Case, side: str, out: Path) -> Measured:
    """`strop.train`, as a user calls it; two of its functions are wrapped to be timed, and what the side leaves out or
    forces is replaced."""
    from dataclasses import replace

    import strop
    from strop.engine.loop import Loop
    from strop.policy import build
    from strop.policy.kernels import product_rates
    from strop.session import Session

    if side == "denormal":
        build.flush_denormals = lambda: None
    if side == "widened":
        found = product_rates.ways_of_run
        low = {f"bfloat16 {kind}": "widened" for kind in ("linear", "batched")}
        product_rates.ways_of_run = lambda *asked: {**found(*asked), **low}
    if side == "fp32":
        case = replace(case, bf16=False)

    measured, step = Measured(start_mib=mib("VmRSS")), Loop.step
    Session.score = timed(Session.score, measured)  # type: ignore[method-assign]

    def marked(loop: Loop, number: int) -> None:
        if not measured.marks:
            measured.begin()
        step(loop, number)
        measured.mark()

    Loop.step = marked  # type: ignore[method-assign]
    [result] = strop.train(strop_config(folder, case, out))
    check_side(side, json.loads((result.run_dir / "environment.json").read_text(encoding="utf-8"))["products"]["ways"])
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if r["split"] == "train"]
    measured.losses = [r["loss"] for r in records]
    measured.scored_tokens = sum(r["num_scored_tokens"] for r in records)
    measured.real_tokens = measured.fed_tokens = records[-1]["tokens"]
    measured.head_rows = measured.scored_tokens
    return measured


def check_side(side: str, ways: Mapping[str, str]) -> None:
    """The run was what its side is said to be. ways: of its products."""
    import torch

    flushes = not bool((torch.full((1,), 1e-39) * 0.5).view(torch.int32).any())
    if flushes is (side == "denormal") and torch.set_flush_denormal(flushes):
        raise SystemExit(f"{side}: denormal numbers were {'' if flushes else 'not '}flushed")
    if side == "widened" and ways.get("bfloat16 linear") != "widened":
        raise SystemExit(f"{side}: products were made otherwise: {ways}")
    if side == "fp32" and "bfloat16 linear" in ways:
        raise SystemExit(f"{side}: the run computed in bfloat16")


def drawn_groups(case: Case) -> list[list[Group]]:
    """The groups of each step, of random tokens."""
    from array import array

    import numpy as np

    from strop.types import Completion, Group, Origin

    random = np.random.default_rng(SEED)
    prompt, n, length = GROUP

    def ids(count: int) -> array[int]:
        return array("i", random.integers(4, 30_000, count).tolist())

    def group() -> Group:
        completions = tuple(Completion(ids(length), bytes([1]) * length) for _ in range(n))
        return Group(ids(prompt), completions, Origin("benchmark", 1))

    return [[group() for _ in range(case.batch)] for _ in range(case.steps)]


def group_side(folder: Path, case: Case, out: Path, side: str) -> Measured:
    """Forward and backward of one group a step by the policy itself, prompts shared or repeated."""
    from dataclasses import replace

    import torch

    from strop.plan.cutting import cut
    from strop.plan.micro_batch_size import CPU_TOKENS
    from strop.plan.row_tokens import packed_tokens
    from strop.policy.build import build_policy

    plain = side == "plain"
    config = strop_config(folder, case, out, plain=plain)
    policy = build_policy(config, config.models[0], torch.device("cpu"))
    assert policy.share_prefix is not plain
    measured, groups = Measured(), drawn_groups(case)
    prompt, n, length = GROUP
    measured.begin()
    for part in groups:
        micro_batches, scored, loss = [part], sum(g.num_scored for g in part), 0.0
        if side == "alone":
            single = [replace(g, completions=(c,)) for g in part for c in g.completions]
            cuts = cut(single, range(len(single)), CPU_TOKENS, packed_tokens)
            micro_batches = [[single[i] for i in one] for one in cuts]
        for micro_batch in micro_batches:
            batch = policy.collate(micro_batch)
            share = policy(batch).logps.sum().neg() / scored
            share.backward()
            loss += float(share.detach())
            del share  # its graph's nodes split the heap, as in a step of the engine
            measured.fed_tokens += batch.input_ids.numel()
        policy.zero_grad(set_to_none=True)
        measured.mark()
        measured.losses.append(loss)
        measured.scored_tokens += scored
        measured.real_tokens += sum(g.num_tokens if side == "strop" else n * (prompt + length - 1) for g in part)
    measured.head_rows = measured.scored_tokens
    return measured


# -- TRL --------------------------------------------------------------------------------------------------------------


def trl_settings(case: Case, side: str, out: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "num_train_epochs": 1,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None if side == "P" else case.max_length,
        "bf16": case.bf16,
        "use_cpu": True,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": side == "D",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": SEED,
    }
    if case.method == "sft":
        return {**settings, "padding_free": side == "P"}
    return {**settings, "precompute_ref_log_probs": side != "D"}


def watch_head(measured: Measured, completions_only: bool) -> None:
    """Count the positions that TRL's head scores; where asked, make it take the road that it takes on CUDA.

    That road is chosen by what `_use_triton` answers in `trl.trainer.utils`. The kernels have a name of their own for
    the same function and go on in plain torch, as they must on a CPU.
    """
    from trl.trainer import utils

    if completions_only:
        utils._use_triton = lambda device: True
    original = utils._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden: Any, weight: Any, bias: Any, labels: Any, *rest: Any) -> Any:
            measured.head_rows += len(hidden)
            return original.apply(hidden, weight, bias, labels, *rest)

    utils._ChunkedLogProbFunction = Counted


def check_head(measured: Measured, case: Case, side: str) -> None:
    """The figures are of the road that they are said to be of."""
    passes = 2 if case.method == "dpo" else 1  # policy and reference see the same rows
    scored = measured.scored_tokens * passes
    if side in ("G", "P") and measured.head_rows != scored:
        raise SystemExit(f"{side}: TRL's head scored {measured.head_rows} positions, and {scored} were asked for")
    if side in ("D", "B") and measured.head_rows <= scored:
        raise SystemExit(f"{side}: TRL's head scored {measured.head_rows} positions, not all of its padded rows")


def trl_model(folder: Path, case: Case, side: str) -> Any:
    """As TRL users load it: float32 under autocast by default; at its best, a frozen base in the compute dtype."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    low = case.bf16 and case.lora and side != "D"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16 if low else torch.float32)
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True) if case.lora else model


def trl_side(folder: Path, case: Case, side: str, out: Path) -> Measured:
    import datasets
    from transformers import AutoTokenizer, TrainerCallback

    measured = Measured()
    watch_head(measured, completions_only=side in ("G", "P"))
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            measured.begin()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            measured.mark()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
            measured.losses += [logs["loss"]] if "loss" in logs else []

    order = "D" if side in ("D", "P") else "B"
    lines = (folder / f"rows.{order}.jsonl").read_text(encoding="utf-8").splitlines()
    config, trainer_class = (SFTConfig, SFTTrainer) if case.method == "sft" else (DPOConfig, DPOTrainer)
    if case.method == "dpo":
        DPOTrainer._precompute_ref_logps = timed(DPOTrainer._precompute_ref_logps, measured)
    trainer = trainer_class(
        model=trl_model(folder, case, side),
        args=config(**trl_settings(case, side, out)),
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
    )
    if len(trainer.train_dataset) != case.num_rows:
        raise SystemExit(f"TRL kept {len(trainer.train_dataset)} of {case.num_rows} rows")
    trainer.data_collator = _counting(trainer.data_collator, measured)
    trainer.train()
    trainer.save_model(str(out / "final"))
    check_head(measured, case, side)
    return measured


def trl_group_side(folder: Path, case: Case, out: Path, side: str) -> Measured:
    """The loss of GRPOTrainer, and its gradients, of completions that are given, with advantages of their own."""
    import datasets
    import torch
    from transformers import AutoTokenizer

    measured = Measured()
    watch_head(measured, completions_only=side == "G")
    from trl import GRPOConfig, GRPOTrainer

    _, n, length = GROUP
    trainer = GRPOTrainer(
        model=trl_model(folder, case, side),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=case.batch * n,
            num_generations=n,
            max_completion_length=length,
            loss_type="grpo",
            gradient_checkpointing=False,
            bf16=case.bf16,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w4"}] * case.batch),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    groups = drawn_groups(case)
    measured.begin()
    for part in groups:
        prompts = torch.tensor([list(g.prompt_ids) for g in part for _ in g.completions])
        completions = torch.tensor([list(c.ids) for g in part for c in g.completions])
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions,
            "completion_mask": torch.ones_like(completions),
            "advantages": torch.linspace(-1.0, 1.0, len(completions)),
        }
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.model.zero_grad(set_to_none=True)
        measured.mark()
        measured.losses.append(float(loss.detach()))
        measured.scored_tokens += completions.numel()
        measured.fed_tokens += prompts.numel() + completions.numel()
    measured.real_tokens = measured.fed_tokens
    check_head(measured, case, side)
    return measured


def _counting(collate: Callable[[Any], Any], measured: Measured) -> Callable[[Any], Any]:
    def counted(examples: Any) -> Any:
        batch = collate(examples)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        scored = batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != -100
        measured.fed_tokens += ids.numel()
        measured.real_tokens += ids.numel() if mask is None else int(mask.sum())
        measured.scored_tokens += int(scored.sum())
        return batch

    return counted


# -- the process ------------------------------------------------------------------------------------------------------


def run_side(folder: Path, case: Case, side: str) -> Measured:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place)
        # nothing that an earlier round left is found: tokens, reference log-probs
        os.environ |= {"STROP_CACHE": str(out / "cache"), "HF_DATASETS_CACHE": str(out / "datasets")}
        if case.method == "group":
            of_group = trl_group_side if side in ("B", "G") else group_side
            measured = of_group(folder, case, out, side)
        elif side in OURS:
            measured = strop_side(folder, case, side, out)
        else:
            measured = trl_side(folder, case, side, out)
    if len(measured.marks) != case.steps + 1:
        raise SystemExit(f"{side}: {len(measured.marks) - 1} steps were taken, not {case.steps}")
    measured.peak_mib = mib("VmHWM")
    return measured


def main() -> None:
    folder, side, case = Path(sys.argv[1]), sys.argv[2], Case.of(json.loads(sys.argv[3]))
    measured = run_side(folder, case, side)
    (folder / "measured.json").write_text(json.dumps(asdict(measured)), encoding="utf-8")


if __name__ == "__main__":
    main()
