"""What a run is that findings are tried on, and how it is trained."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scenarios.models import TinyModel
from benchmarks.scenarios.rows import AS_READ, Splits, as_prompts, healthy

RECIPE: Mapping[str, Any] = {
    "models.0.name": "run",
    "models.0.huggingface_id": TinyModel.MODEL,
    "training.num_epochs": 2,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 5e-4,
    "training.logging_steps": 1,
    "training.eval_steps": 20,
    "training.save_steps": 10_000,
    "training.max_seq_length": 48,
    "training.reference_store": False,
    "finetuning.load_best_model_at_end": False,
    "finetuning.early_stopping_patience": None,
    "logging.log_level": "error",
}


def rewarded(*pays: str, weights: Sequence[float] = (1.0,)) -> Mapping[str, Any]:
    """The rewards as a setting. pays: see `quality`; default: one that pays for quality."""
    name = f"{Path(__file__).with_name('quality.py')}:quality"
    settings = [{"pays": word} for word in pays] or [{}]
    found = [{"name": name, "settings": x, "weight": w} for x, w in zip(settings, weights, strict=True)]
    return {"rewards": found}


SAMPLING: Mapping[str, Any] = {
    "models.0.huggingface_id": TinyModel.TAUGHT,
    "training.num_epochs": 1,
    "training.learning_rate": 1e-3,
    "training.max_completion_length": 24,
    "rollout.num_generations": 6,
    "rollout.temperature_eval": 1.0,
    **rewarded(),
}
"""What runs that sample have beside `RECIPE`."""


@dataclass(frozen=True)
class Scenario:
    """A run. first: the finding that it must raise first; empty: it is healthy. keys: its settings, beside those of
    every run. rows: both splits. during: what is otherwise while it trains. after: what is done to the folder once it
    is trained. fails: the training ends with an error."""

    name: str
    method: str
    first: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[random.Random], Splits] = healthy
    during: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    after: Callable[[Path], None] | None = None
    fails: bool = False

    @property
    def samples(self) -> bool:
        """Whether the policy samples its completions."""
        return self.method == "grpo" or "post_training.online" in self.keys


def trained(scenario: Scenario, folder: Path, seed: int = 0) -> Path:
    """The run folder. folder: has the models; rows and runs are written there."""
    import strop
    from strop.errors import StropError

    place = folder / f"{scenario.name.replace(' ', '-').replace(',', '')}-{seed}"
    place.mkdir()
    settings = {
        **RECIPE,
        **(SAMPLING if scenario.samples else {}),
        "post_training.method": scenario.method,
        **_files(scenario, place, seed),
        "training.output_dir": str(place),
        "seed": seed,
        **scenario.keys,
    }
    found = {key: model_folder(folder, v) if isinstance(v, TinyModel) else v for key, v in settings.items()}
    try:
        with scenario.during():
            strop.train(strop.load_config(overrides=found))
    except StropError:
        if not scenario.fails:
            raise
    run = place / "run"
    if scenario.after is not None:
        scenario.after(run)
    return run


def _files(scenario: Scenario, place: Path, seed: int) -> dict[str, str]:
    """Writes the rows; their paths as settings."""
    as_read = as_prompts if scenario.samples else AS_READ.get(scenario.method, list)
    found = {}
    for name, rows in zip(("train", "val"), scenario.rows(random.Random(seed)), strict=True):
        path = place / f"{name}_file.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in as_read(rows)))
        found[f"dataset.{name}_file"] = str(path)
    return found


TAUGHT = Scenario("taught", "sft", keys={"training.num_epochs": 8, "training.learning_rate": 5e-3})


def model_folder(folder: Path, model: TinyModel) -> str:
    """Where a model is; the one that has learnt by sft is trained when it is first asked for."""
    if model is not TinyModel.TAUGHT:
        return str(folder / model)
    run = folder / f"{TAUGHT.name}-0" / "run"
    return str((run if run.is_dir() else trained(TAUGHT, folder)) / "final")
