"""Seconds and memory that it takes to turn a file of rows into tokens, strop beside TRL, on synthetic conversations.

    python benchmarks/data.py [--rows 10000,100000] [--words 120] [--workers 2] [--tokenizer DIR]
                              [--sides strop,again,trl]

Both read the same JSON Lines file with the same tokenizer and chat template, in as many processes. `again` is strop's
second start. TRL 1.16 prepares it as SFTTrainer does, with completion_only_loss. Each side has a process of its own.
Memory is the largest anonymous memory (Pss) of all its processes together above that before the rows, seen every
0.2 seconds: pages of files that the operating system may drop at any time are not counted. Seconds of processors are
those of all processes together, which other work on the machine changes least. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_LENGTH = 512


def write_rows(path: Path, num_rows: int, num_words: int) -> None:
    """Prompts and answers twice as long, of some `num_words` of 20,000 made-up words together, frequent ones first."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (n + 3) for n in range(len(words))]
    pool = rng.choices(words, weights, k=2_000_000)

    def text(mean: int) -> str:
        n = max(3, int(rng.gauss(mean, mean / 3)))
        start = rng.randrange(len(pool) - n)
        return " ".join(pool[start : start + n])

    with path.open("w") as file:
        for i in range(num_rows):
            prompt, answer = f"{i} {text(num_words // 3)}", text(num_words * 2 // 3)
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            file.write(json.dumps(row) + "\n")


def write_tokenizer(rows: Path, folder: Path) -> None:
    """A byte-level BPE of 8,000 tokens, made from the first rows."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with rows.open() as file:
        tokenizer.train_from_iterator(islice(file, 5000), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def anonymous_mib(pid: int) -> float:
    """Anonymous memory of a process and its children, pages shared with others by their part."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous_mib(int(child)) for child in (task / "children").read_text().split())
    except (OSError, ValueError):  # it has just ended
        pass
    return total


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    before, result, stop = anonymous_mib(os.getpid()), {"peak_mib": 0.0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            result["peak_mib"] = max(result["peak_mib"], anonymous_mib(os.getpid()) - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    started, worked = time.perf_counter(), processor_seconds()
    yield result
    result["seconds"] = time.perf_counter() - started
    result["processor_seconds"] = processor_seconds() - worked
    stop.set()
    thread.join()


def run_strop(folder: Path, tokenizer_dir: Path, workers: int) -> dict[str, float]:
    from transformers import AutoTokenizer

    from strop.config import DatasetSection, ModelSection, RunConfig, TrainingSection
    from strop.data.load import load_data

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = RunConfig(
        models=[ModelSection(huggingface_id="none")],
        dataset=DatasetSection(train_file=str(folder / "rows.jsonl"), num_workers=workers, validation_split=0.0),
        training=TrainingSection(max_seq_length=MAX_LENGTH, max_prompt_length=None, max_completion_length=None),
    )
    with measured() as result:
        data = load_data(config, tokenizer, "single")
        result["rows"] = len(data.train)
    result["tokens"] = int(data.report.statistics["train"]["tokens"]["plain"])
    return result


def run_trl(folder: Path, tokenizer_dir: Path, workers: int) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    settings = SFTConfig(
        output_dir=str(folder / "trl"), dataset_num_proc=workers, max_length=MAX_LENGTH, completion_only_loss=True,
        report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    with measured() as result:
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
        result["rows"] = len(trainer.train_dataset)
    result["tokens"] = sum(len(ids) for ids in trainer.train_dataset[:1000]["input_ids"]) / 1000 * result["rows"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000", help="one number or several, with commas")
    parser.add_argument("--words", type=int, default=120, help="of a row")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--sides", default="strop,again,trl")
    parser.add_argument("--inside", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        side, folder = args.inside[0], Path(args.inside[1])
        run = run_trl if side == "trl" else run_strop
        print(json.dumps(run(folder, args.tokenizer or folder / "tokenizer", args.workers)))
        return
    for num_rows in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as name:
            compare(Path(name), num_rows, args)


def compare(folder: Path, num_rows: int, args: argparse.Namespace) -> None:
    write_rows(folder / "rows.jsonl", num_rows, args.words)
    if args.tokenizer is None:
        write_tokenizer(folder / "rows.jsonl", folder / "tokenizer")
    environment = {**os.environ, "STROP_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"),
                   "HF_DATASETS_CACHE": str(folder / "hf" / "datasets"), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    size = (folder / "rows.jsonl").stat().st_size / 1e6
    print(f"{num_rows:,} rows, {size:.0f} MB, {args.workers} processes", flush=True)
    for side in args.sides.split(","):
        command = [sys.executable, __file__, "--workers", str(args.workers), "--inside", side, str(folder)]
        command += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        seconds, rows = found["seconds"], found["rows"]
        print(
            f"{side:6} {seconds:8.1f} s {found['processor_seconds']:8.1f} s of processors "
            f"{rows / seconds:10,.0f} rows/s {found['tokens'] / seconds:12,.0f} tokens/s "
            f"{found['peak_mib']:8.0f} MiB more memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
