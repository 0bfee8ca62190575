"""The demo from end to end: files, SFT, DPO, GRPO, test, table. Floor 9.

In: a seed and a folder. Out: in that folder, the data, the base model, three configurations, three run folders and
summary.json; on the terminal, a table of held-out accuracy. Training goes the public road, `strop.load_config` and
`strop.train`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import strop
from strop.demo.model import answer, write_base
from strop.demo.task import ASK, LONG, NUM_ITEMS, RUSH, SORTED_BY_RUSH, Items, Size, accuracy, is_right, write_data
from strop.durable import published, write_file
from strop.errors import ConfigError

WRITTEN_BY = "# Written by `strop demo`, which writes it anew each time.\n"
"""First line of all configurations; it also marks a folder as one that the demo may use."""

SFT_YAML = """\
# Supervised fine-tuning of a random model on demonstrations, two in three of them made in a rush.
# Run it again:  strop train --overwrite --config {here}/sft.yaml
seed: {seed}
models:
  - name: sft
    huggingface_id: "{here}/base"
dataset:
  train_file: "{here}/data/sft.train.jsonl"
  val_file: "{here}/data/sft.val.jsonl"
post_training:
  method: sft
training:
  output_dir: "{here}"
  num_epochs: {sft_epochs}
  per_device_train_batch_size: 64
  per_device_eval_batch_size: 100
  gradient_accumulation_steps: 1
  learning_rate: 0.002        # from random weights; a pretrained model wants a hundredth of it
  warmup_steps: 20
  max_seq_length: 32
  max_prompt_length: 16
  max_completion_length: 16
  logging_steps: 25
  eval_steps: 200
finetuning:
  load_best_model_at_end: false
  early_stopping_patience: null
"""
DPO_YAML = """\
# Direct preference optimisation of the SFT model: the sorted list is preferred to the rushed one.
# Run it again:  strop train --overwrite --config {here}/dpo.yaml
seed: {seed}
models:
  - name: dpo
    huggingface_id: "{here}/sft/final"
dataset:
  train_file: "{here}/data/dpo.train.jsonl"
  val_file: "{here}/data/dpo.val.jsonl"
post_training:
  method: dpo
  beta: 0.3
  label_smoothing: 0.1        # a pair that is won clearly pulls no further, so the skill from SFT stays whole
training:
  output_dir: "{here}"
  num_epochs: 1
  per_device_train_batch_size: 32
  per_device_eval_batch_size: 50
  gradient_accumulation_steps: 1
  learning_rate: 0.0001       # for a model this small; a large one collapses above 1e-5
  warmup_steps: 5
  max_seq_length: 32
  max_prompt_length: 16
  max_completion_length: 16
  logging_steps: 10
  eval_steps: 30
finetuning:
  load_best_model_at_end: false
  early_stopping_patience: null
"""
GRPO_YAML = """\
# Group relative policy optimisation of the DPO model: it samples eight answers to each list, and the right ones are
# rewarded. A reward needs no demonstration: it only has to be able to check.
# Run it again:  strop train --overwrite --config {here}/grpo.yaml
seed: {seed}
models:
  - name: grpo
    huggingface_id: "{here}/dpo/final"
dataset:
  train_file: "{here}/data/grpo.train.jsonl"
post_training:
  method: grpo
rollout:
  num_generations: 8
rewards:
  - name: exact_match
    settings:
      column: answer
training:
  output_dir: "{here}"
  num_epochs: 1
  per_device_train_batch_size: 64
  gradient_accumulation_steps: 1
  learning_rate: 0.0003       # for a model this small; a large one wants a hundredth of it
  warmup_steps: 2
  max_seq_length: 32
  max_prompt_length: 16
  max_completion_length: 10
  logging_steps: 10
finetuning:
  load_best_model_at_end: false
  early_stopping_patience: null
"""
STAGES = {"sft": SFT_YAML, "dpo": DPO_YAML, "grpo": GRPO_YAML}


def run_demo(seed: int = 0, output_dir: Path = Path("runs/demo"), size: Size | None = None) -> Path:
    """Train and compare base, SFT, DPO and GRPO; everything lies in `output_dir`, which may hold an earlier demo.

    Returns:
        The path of summary.json: held-out accuracy in [0, 1], the paths of the models, seed, seconds.

    Raises:
        ConfigError: `output_dir` holds something else.
        StropError: a training run did not come to its end.
    """
    started = time.perf_counter()
    size = size or Size()
    console = Console(highlight=False)
    configs = _write_configs(output_dir, seed, size)
    summary_path = output_dir / "summary.json"
    summary_path.unlink(missing_ok=True)  # an old result must not stand beside a run that fails
    heldout, heldout_file = write_data(output_dir / "data", seed, size)
    with published(output_dir / "base", replaces=True) as new:
        num_weights = write_base(new, seed)
    _say(console, _introduction(size, num_weights, len(heldout), output_dir))

    folders = {"base": output_dir / "base"}
    with _one_thread():
        for number, name in enumerate(STAGES, start=1):
            _say(console, f"\n[bold]{number}. {name.upper()}[/bold]  strop train --config {escape(str(configs[name]))}")
            (result,) = strop.train(strop.load_config(configs[name]), overwrite=True)
            folders[name] = output_dir / name / "final"
            _say(console, _what_metrics_say(name, result.run_dir / "metrics.jsonl"))
        answers = {name: answer(folder, heldout) for name, folder in folders.items()}

    _say(console, f"\n[bold]4. The test[/bold]  {len(heldout)} lists that stand in no training file, in any order\n")
    console.print(_table(heldout, answers))
    console.print(_samples(heldout, answers))
    summary = {
        "heldout_accuracy": {name: accuracy(heldout, given) for name, given in answers.items()},
        "heldout_file": str(heldout_file),
        "models": {name: str(folders[name]) for name in STAGES},
        "seed": seed,
        "seconds": (seconds := round(time.perf_counter() - started, 1)),
    }
    write_file(summary_path, (json.dumps(summary, indent=2) + "\n").encode())
    _say(console, _where_things_are(output_dir, summary_path, seconds))
    return summary_path


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from more threads, and loses much where other programs want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the folder


def _write_configs(output_dir: Path, seed: int, size: Size) -> dict[str, Path]:
    """Make the folder and write the configurations: they mark it as the demo's before anything else is in it."""
    other = "give another folder: strop demo --output-dir runs/another"
    paths = {name: output_dir / f"{name}.yaml" for name in STAGES}
    here = json.dumps(output_dir.as_posix(), ensure_ascii=False)[1:-1]  # a YAML double-quoted string is a JSON one
    try:
        if not _may_use(output_dir, paths["sft"]):
            raise ConfigError(
                "there is something there that the demo did not write",
                where=str(output_dir),
                expected="an empty folder, an earlier demo's, or none",
                fix=other,
            )
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, text in STAGES.items():
            filled = text.format(here=here, seed=seed, sft_epochs=size.sft_epochs)
            write_file(paths[name], (WRITTEN_BY + filled).encode())
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror or error}", where=str(output_dir), fix=other) from error
    return paths


def _may_use(folder: Path, marker: Path) -> bool:
    if not folder.is_dir():
        return not folder.exists()
    if not any(folder.iterdir()):
        return True
    return marker.is_file() and marker.read_bytes().startswith(WRITTEN_BY.encode())


# ---- what the terminal shows


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)  # a path that is cut in two cannot be copied


def _introduction(size: Size, num_weights: int, num_heldout: int, output_dir: Path) -> str:
    return (
        f"[bold]strop demo[/bold]: a Llama of {num_weights:,} random weights learns to sort shopping lists.\n"
        f"  1. SFT on {size.num_demonstrations:,} demonstrations, {RUSH:.0%} of them by people in a rush, who sort the "
        f"first {SORTED_BY_RUSH} items\n     and leave the rest as it stood\n"
        f"  2. DPO on {size.num_pairs:,} pairs that prefer the sorted list to the rushed one\n"
        f"  3. GRPO on {size.num_questions:,} lists of {' or '.join(map(str, LONG))} items: it samples eight answers "
        "to each, and the right\n     ones are rewarded\n"
        f"  4. a test on {num_heldout} held-out lists\n"
        f"Everything is written to {escape(str(output_dir))}"
    )


def _what_metrics_say(name: str, metrics: Path) -> str:
    """First and last evaluation, as the run wrote them down; of sampled answers the first and last reward."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if name == "grpo":
        first, last = records[0], records[-1]
        return f"   step {last['step']}: share of right answers {first['reward']:.2f} -> {last['reward']:.2f}"
    evals = [record for record in records if record["split"] == "eval"]
    first, last = evals[0], evals[-1]
    text = f"   step {last['step']}: validation loss {first['loss']:.3f} -> {last['loss']:.3f}"
    if name == "dpo":
        text += f", rewards/margins {first['rewards/margins']:.2f} -> {last['rewards/margins']:.2f}"
        text += f", rewards/accuracies {last['rewards/accuracies']:.2f}"
    return text


def _table(heldout: Sequence[Items], answers: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title="Held-out accuracy", title_justify="left")
    table.add_column("model")
    table.add_column("all", justify="right", style="bold")
    for length in NUM_ITEMS:
        table.add_column(f"{length} items", justify="right")
    for name, given in answers.items():
        cells = [f"{accuracy(heldout, given):.1%}"]
        for length in NUM_ITEMS:
            chosen = [i for i, items in enumerate(heldout) if len(items) == length]
            cells.append(f"{accuracy([heldout[i] for i in chosen], [given[i] for i in chosen]):.0%}")
        table.add_row(_shown(name), *cells)
    return table


def _samples(heldout: Sequence[Items], answers: Mapping[str, Sequence[str]]) -> Text:
    """The first held-out list of each length, not the best ones."""
    text = Text()
    for length in NUM_ITEMS:
        at = next(i for i, items in enumerate(heldout) if len(items) == length)
        text.append(f"\n{ASK} {' '.join(heldout[at])}\n", style="bold")
        for name, given in answers.items():
            right = is_right(heldout[at], given[at])
            text.append(f"  {_shown(name):<6}")
            text.append("right  " if right else "wrong  ", style="green" if right else "red")
            text.append((given[at] or "(nothing)") + "\n")
    return text


def _shown(name: str) -> str:
    return name if name == "base" else name.upper()


def _where_things_are(output_dir: Path, summary: Path, seconds: float) -> str:
    *others, last = (escape(str(output_dir / name)) for name in STAGES)
    return (
        f"Run folders: {', '.join(others)} and {last}; the `final` in each loads with plain transformers.\n"
        f"Summary:     {escape(str(summary))}, written after {seconds:.0f} seconds."
    )
