"""Processor seconds that real rows take to become tokens, this tree by another commit, in turn.

    python -m benchmarks.tokenising --against COMMIT [--rows NAME ...] [--rounds 5] [--write docs/data.md]

Rows come from ../shared/data and the tokenizer from ../shared/tokenizers/gpt2, both beside the project; chat templates
are those that the installed package trl carries. Each tree has a process of its own, which reads a file from its start
(nothing cached, one thread, no workers), while the other waits. The first round warms both up; a ratio is the median of
those of the others, since a processor's speed changes from second to second. Figures are processor time, which other
processes do not count in, though they slow memory and caches down for all. Tokens are those of all rows that a side
keeps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .data import CHATML
from .golden import checked_out
from .inputs import ROOT, SHARED

BEGIN, END = "<!-- tokenising: begin -->", "<!-- tokenising: end -->"
ENDS = {"llama3_1": "<|eot_id|>"}
"""Token that ends a turn, by template; <|im_end|> for all others."""


@dataclass(frozen=True)
class Rows:
    """A file of ../shared/data, as one method reads it under one template. template: trl's name of it, or ChatML."""

    what: str
    file: str
    method: str
    template: str

    @property
    def name(self) -> str:
        return f"{self.file.partition('.')[0]}-{self.template}".lower()


ROWS = (
    Rows("pairs behind conversations", "hh_helpful.train.jsonl", "dpo", "ChatML"),
    Rows("pairs", "pref_mix.train.jsonl", "dpo", "ChatML"),
    Rows("conversations", "instruct_sft.train.jsonl", "sft", "ChatML"),
    Rows("conversations", "instruct_sft.train.jsonl", "sft", "qwen2_5"),
    Rows("conversations", "instruct_sft.train.jsonl", "sft", "qwen3"),
    Rows("labelled rows", "kto_unpaired.train.jsonl", "kto", "ChatML"),
    Rows("conversations with tool calls", "sft_toolcalls.train.jsonl", "sft", "qwen2_5"),
    Rows("conversations with tool calls", "sft_toolcalls.train.jsonl", "sft", "qwen3"),
    Rows("conversations with tool calls", "sft_toolcalls.train.jsonl", "sft", "llama3_1"),
)


def read_again_and_again(config: Path, cache: Path) -> None:
    """A side: read the rows once for every line on standard input, and answer with a line."""
    import time

    import strop
    from strop.config import resolve
    from strop.data.load import load_data
    from strop.objectives.base import build_objective
    from strop.policy.load import load_tokenizer
    from strop.types import Group

    resolved = resolve(strop.load_config(config))
    tokenizer = load_tokenizer(resolved.models[0])
    shape = build_objective(resolved.post_training).rows
    tokens: int | None = None
    for _ in sys.stdin:
        shutil.rmtree(cache, ignore_errors=True)
        began = time.process_time()
        try:
            groups: Sequence[Group] = load_data(resolved, tokenizer, shape).train
        except strop.StropError:  # all rows are refused
            groups = ()
        seconds = time.process_time() - began
        if tokens is None:  # the same in every round
            tokens = sum(len(g.prompt_ids) + sum(len(c.ids) for c in g.completions) for g in groups)
        print(json.dumps({"seconds": seconds, "rows": len(groups), "tokens": tokens}), flush=True)


class Side:
    """A process that reads rows with the code of one tree."""

    def __init__(self, tree: Path, work: Path, config: Path) -> None:
        cache = work / "cache"
        environment = os.environ | {
            "PYTHONPATH": f"{tree / 'src'}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",  # of the package tokenizers
            "STROP_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tokenising", "--side", str(config), str(cache)],
            env=environment,
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit("a side ended before its time")

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def template_of(rows: Rows) -> str:
    """The text of a chat template."""
    if rows.template == "ChatML":
        return CHATML
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        raise SystemExit("the package trl is not there; it holds the chat templates (extra dev)")
    found = Path(package.origin).parent / "chat_templates" / f"{rows.template}.jinja"
    return found.read_text(encoding="utf-8")


def write_inputs(work: Path, rows: Rows) -> Path:
    """A model that is as small as can be, with the tokenizer, and a configuration that names it and the rows."""
    import re

    import yaml
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model, template, end = work / "model", template_of(rows), ENDS.get(rows.template, "<|im_end|>")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    controls = sorted(set(re.findall(r"<\|[a-z_]+\|>", template)) | {end})
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": "<|endoftext|>"})
    tokenizer.add_tokens(controls, special_tokens=True)
    tokenizer.add_tokens([t for t in ("<think>", "</think>", "<tool_call>", "</tool_call>") if t in template])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(model)
    config = {
        "models": [{"name": "m", "huggingface_id": str(model)}],
        "dataset": {
            "train_file": str(SHARED / "data" / rows.file),
            "validation_split": 0.0,
            "num_workers": 1,
            "on_error": "skip",
            "max_dropped_fraction": 1.0,
        },
        "post_training": {"method": rows.method},
        "training": {
            "output_dir": str(work / "out"),
            "max_seq_length": 2048,
            "max_prompt_length": None,
            "max_completion_length": None,
        },
    }
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def compare(trees: Sequence[Path], rows: Rows, rounds: int) -> dict[str, Any]:
    """The figures of one file; trees: this one and the other."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        config, sides = write_inputs(Path(folder), rows), []
        for name, tree in zip(("new", "old"), trees, strict=True):
            work = Path(folder) / name
            work.mkdir()
            sides.append(Side(tree, work, config))
            running.callback(sides[-1].stop)
        found: tuple[list[dict[str, Any]], ...] = ([], [])
        for number in range(rounds + 1):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                found[side].append(sides[side].read())
    new, old = ({**times[0], "seconds": median(t["seconds"] for t in times[1:])} for times in found)
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(found[0][1:], found[1][1:], strict=True))
    return {"rows": rows.name, "new": new, "old": old, "ratios": ratios, "ratio": median(ratios)}


def table(found: Sequence[Mapping[str, Any]], against: str) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| rows | template | processor seconds | divided by those of {against[:7]} (least, most) | tokens, divided |"
    yield "|---|---|---|---|---|"
    known = {rows.name: rows for rows in ROWS}
    for result in found:
        rows, new, old = known[result["rows"]], result["new"], result["old"]
        if old["rows"] < new["rows"] / 2:
            beside = f"{new['rows'] - old['rows']:,} rows refused then |"
        else:
            span = f"{min(result['ratios']):.2f} - {max(result['ratios']):.2f}"
            beside = f"{result['ratio']:.2f} ({span}) | {new['tokens'] / old['tokens']:.3f}"
        yield f"| {new['rows']:,} {rows.what} | {rows.template} | {new['seconds']:.2f} | {beside} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--rows", nargs="+", choices=[rows.name for rows in ROWS], help="all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the two markers of the table")
    parser.add_argument("--side", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        read_again_and_again(*args.side)
        return
    if not args.against:
        parser.error("--against is missing")
    if not SHARED.is_dir():
        raise SystemExit(f"{SHARED} is not there; it holds the rows and the tokenizer")
    found = []
    with checked_out(args.against) as tree:
        for rows in ROWS:
            if args.rows is None or rows.name in args.rows:
                found.append(compare((ROOT, tree), rows, args.rounds))
                print(json.dumps(found[-1]), flush=True)
    lines = "\n".join(table(found, args.against))
    print(lines)
    if args.write:
        before, _, rest = args.write.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        args.write.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
