"""Every method trains: a few steps of a tiny model through the whole road, with finite, falling losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import strop
from strop import wiring
from strop.config import METHODS
from strop.objectives.base import build_objective

ROWS = 6


def write_rows(path: Path, method: str) -> Path:
    lines = []
    for i in range(ROWS):
        prompt, good, bad = f"count {i}", "yes " * (1 + i % 3), "no dog " * (1 + i % 2)
        if build_objective(METHODS[method]()).rows == "single":
            lines.append({"prompt": prompt, "completion": good})
        else:
            lines.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def train(method: str, folder: Path, model_dir: Path, **training: Any) -> list[dict[str, Any]]:
    config = strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(model_dir)}],
            "dataset.train_file": str(write_rows(folder / "rows.jsonl", method)),
            "dataset.validation_split": 0.34,
            "post_training": {"method": method},
            "training": {
                "output_dir": str(folder / "out"),
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "num_epochs": 4,
                "logging_steps": 1,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 4,
                **training,
            },
        }
    )
    (result,) = strop.train(config)
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_it_trains(method: str, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build_objective(METHODS[method]())
    if not objective.needs_reference:
        monkeypatch.delattr(wiring, "reference_policy")  # whoever asks for a reference fails
    records = train(method, tmp_path, model_dir)
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    for record in records:
        assert objective.METRICS.keys() <= record.keys()
