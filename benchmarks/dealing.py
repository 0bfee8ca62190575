"""How long processes wait for the slowest one in each step, by the way in which groups are dealt to them.

    python -m benchmarks.dealing [--write]

Nothing is trained: what each group costs is predicted (`strop.estimate.group_cost`), for the rows of a data set in the
order of a run and a model of 135 million weights. "strop" deals by predicted cost. "every n-th" gives process r the
rows r, r + n, r + 2n, ... of each step, as a distributed sampler does. --write puts the table into
docs/scaling.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from strop.config import load_config
from strop.estimate import group_cost
from strop.lengths import Lengths
from strop.modelrows import ModelRows
from strop.plan.dealing import deal
from strop.plan.order import Plan
from strop.plan.row_tokens import packed_tokens
from strop.policy.model.from_config import shape_of

from .cases import SHAPES
from .inputs import SHARED, TOKENIZER

DATA_SETS = ("pref_mix", "hh_helpful")
PROCESSES = (8, 64)
GROUPS_PER_PROCESS = 16
"""Of a step, as the default batch size times the default accumulation."""
BEGIN, END = "<!-- dealing -->", "<!-- /dealing -->"


def costs_of(name: str, folder: Path) -> tuple[Lengths, np.ndarray]:
    """The lengths of a data set's pairs, and what each costs."""
    config = load_config(
        overrides={
            "models.0.huggingface_id": str(folder),
            "dataset.train_file": str(SHARED / "data" / f"{name}.train.jsonl"),
            "dataset.template": "chatml",
            "dataset.validation_split": 0.0,
            "post_training.method": "dpo",
            "training.max_seq_length": 1024,
            "training.max_prompt_length": 512,
            "training.max_completion_length": 512,
        }
    )
    lengths = ModelRows.of(config, config.models[0], needs_weights=False).load().train.lengths
    cost = group_cost(shape_of(config.lora, config.models[0]), config)
    return lengths, cost.of_each(lengths, packed_tokens)


def idle_share(loads: np.ndarray) -> float:
    """The part of all processes' time that is spent waiting for the slowest one. loads: [steps, processes]."""
    return float(1 - loads.sum() / (loads.max(axis=1).sum() * loads.shape[1]))


def idle_of(costs: np.ndarray, num_processes: int) -> tuple[float, float]:
    """The idle share of an epoch: strop's, and that of every n-th row."""
    plan = Plan.of(len(costs), num_processes * GROUPS_PER_PROCESS, 1, None, 42)
    ours, naive = [], []
    for step in range(1, plan.num_steps + 1):
        own = costs[list(plan.groups(step))]
        if len(own) < num_processes * GROUPS_PER_PROCESS:
            continue  # the last step of an epoch is shorter
        ours.append([own[share].sum() for share in deal(own, num_processes)])
        naive.append([own[rank::num_processes].sum() for rank in range(num_processes)])
    return idle_share(np.array(ours)), idle_share(np.array(naive))


def table() -> Iterator[str]:
    from transformers import AutoConfig, AutoTokenizer

    yield "| rows | pairs | processes | pairs per step | idle, strop | idle, every n-th row |"
    yield "|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        shape = {**SHAPES["smol"], "vocab_size": len(tokenizer)}
        AutoConfig.for_model(**shape, tie_word_embeddings=True).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in DATA_SETS:
            lengths, costs = costs_of(name, folder)
            for size in PROCESSES:
                ours, naive = idle_of(costs, size)
                per_step = size * GROUPS_PER_PROCESS
                yield f"| {name} | {len(lengths):,} | {size} | {per_step:,} | {ours:.2%} | {naive:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    lines = "\n".join(table())
    print(lines)
    if parser.parse_args().write:
        page = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
