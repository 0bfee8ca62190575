"""Run folders made in code: what a run of some method leaves, with whatever a test changes in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.report.diagnose import Diagnosis, diagnose
from strop.report.findings import Finding
from strop.report.run_record import read_run

LN2 = math.log(2)
SETTINGS: Mapping[str, Any] = {
    "seed": 42,
    "models.name": "run",
    "models.huggingface_id": "org/model",
    "models.adapter": None,
    "dataset.val_file": None,
    "dataset.validation_split": 0.1,
    "dataset.filter_overlength_samples": False,
    "post_training.method": "dpo",
    "post_training.beta": 0.1,
    "post_training.loss_type": "sigmoid",
    "post_training.label_smoothing": 0.0,
    "post_training.sft_weight": 0.0,
    "post_training.ref_model_id": None,
    "post_training.simpo_beta": 2.0,
    "post_training.desirable_weight": 1.0,
    "post_training.undesirable_weight": 1.0,
    "lora.enabled": False,
    "training.output_dir": "outputs",
    "training.num_epochs": 2,
    "training.max_steps": None,
    "training.learning_rate": 5e-7,
    "training.warmup_steps": None,
    "training.warmup_ratio": 0.1,
    "training.max_seq_length": 512,
    "training.max_grad_norm": 1.0,
    "training.bf16": None,
    "training.fp16": None,
    "training.reference_store": True,
    "finetuning.load_best_model_at_end": False,
    "logging.logging_dir": "./logs",
}
SPLIT = {
    "source": "rows.jsonl",
    "rows_read": 1000,
    "kept": 1000,
    "refused": {},
    "dropped": {},
    "completions_cut": 0,
    "num_groups": 1000,
    "num_completions": 2000,
    "findings": {
        "duplicates": 0,
        "contradictions": 0,
        "missing_eos": 0,
        "double_bos": 0,
        "leaked_prompts": 0,
        "leaked_rows": 0,
        "length": {"mean_chosen": 20.0, "mean_rejected": 20.0, "chosen_is_longer": 0.5},
        "desirable": 0,
        "undesirable": 0,
    },
}
STEPS = 100


def healthy(step: int, split: str) -> dict[str, Any]:
    """A line of a DPO run that goes well: chosen up a little, rejected down, the gradient falls."""
    done = step / STEPS
    chosen, rejected = 2.0 * done, -5.0 * done
    margin = 0.1 * (chosen - rejected)
    line = {
        "step": step,
        "epoch": 2 * done,
        "split": split,
        "loss": LN2 - 0.3 * done,
        "rewards/chosen": 0.1 * chosen,
        "rewards/rejected": 0.1 * rejected,
        "rewards/margins": margin,
        "rewards/accuracies": 0.0 if step == 0 else 0.55 + 0.3 * done,
        "lengths/chosen": 20.0,
        "lengths/rejected": 20.0,
        "num_groups": 800,
    }
    if split == "train":
        line |= {"learning_rate": 5e-7, "grad_norm": 2.0 - done, "clipped": 0.5, "changed_fraction": 0.9}
        line |= {"num_zero_signal_groups": 0, "num_groups": 32, "tokens": 1000 * step, "seconds": 2.0 * step}
        line |= {"peak_memory_gib": 1.5, "tokens_per_second": 500.0}
    else:
        line["seconds"] = 3.0
    return line


@dataclass
class Made:
    """A run folder. `settings`, `split` (data.json of the training rows) and lines can be changed before `write`."""

    path: Path
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    train: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(SPLIT)))
    eval: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(SPLIT)))
    lines: list[dict[str, Any]] = field(default_factory=list)
    margins: Sequence[np.ndarray] = ()
    plan: dict[str, Any] = field(default_factory=lambda: {"num_steps": STEPS, "vocabulary": 32000})
    pairs: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(self.yaml(), encoding="utf-8")
        files = {
            "data.json": {"fingerprint": "abc", "splits": {"train": self.train, "eval": self.eval}},
            "environment.json": {"python": "3.11", "packages": {"torch": "2"}, "command": ["strop", "train"]},
            "result.json": {"reason": "all 100 steps are done", "num_steps": STEPS},
            "plan.json": self.plan,
            "pairs.json": self.pairs,
        }
        for name, value in files.items():
            (self.path / name).write_text(json.dumps(value), encoding="utf-8")
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.path / "metrics.jsonl").write_text(text, encoding="utf-8")
        (self.path / "final").mkdir(exist_ok=True)
        self._write_margins()
        return self.path

    def yaml(self) -> str:
        sections: dict[str, list[str]] = {}
        for key, value in self.settings.items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section, []).append(f"{name}: {json.dumps(value)}")
        text = "".join(line + "\n" for line in sections.pop("", []))
        for section, lines in sections.items():
            lead = "  - " if section == "models" else "  "
            text += f"{section}:\n{lead}{lines[0]}\n" + "".join(
                f"{'    ' if section == 'models' else '  '}{line}\n" for line in lines[1:]
            )
        return text

    def _write_margins(self) -> None:
        folder = self.path / "logs" / "margins"
        for step, values in enumerate(self.margins):
            file = folder / "epoch_000" / f"step_{step:05d}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.asarray(values, np.float32))
        if self.margins:
            lines = [{"epoch": 0, "step": i, "global_step": i + 1, "mean": 0.0} for i in range(len(self.margins))]
            (folder / "margins_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def diagnose(self) -> Diagnosis:
        return diagnose(read_run(self.write()))

    def finding(self, id_: str) -> Finding:
        """The one finding with this id."""
        (found,) = [f for f in self.diagnose().findings if f.id == id_]
        return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """make(): a healthy DPO run of 100 steps; make(lambda line: {...}) changes each of its lines, make(name=...)."""

    def made(change: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None, name: str = "run") -> Made:
        found = Made(tmp_path / name)
        steps = [(0, "eval")] + [(s, split) for s in range(2, STEPS + 1, 2) for split in ("train", "eval") if
                                 split == "train" or s % 20 == 0]  # fmt: skip
        found.lines = [healthy(step, split) for step, split in steps]
        if change is not None:
            found.lines = [{**line, **change(line)} for line in found.lines]
        return found

    return made
