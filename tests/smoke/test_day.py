"""A chat template that prints the day: the first launch fixes it, and a resume keeps it."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pytest
import yaml

import strop
from conftest import CHATML, build_model, build_tokenizer
from strop.data.text import date as days


def test_a_resume_keeps_the_day_of_the_first_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    build_model().save_pretrained(model)
    build_tokenizer("{{ strftime_now('%d %B %Y') }}" + CHATML).save_pretrained(model)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 6)

    def launch(day: datetime.date, cache: str) -> Path:
        monkeypatch.setattr(days, "today", lambda: day)
        monkeypatch.setenv("STROP_CACHE", str(tmp_path / cache))
        config = {
            "models": [{"name": "run", "huggingface_id": str(model)}],
            "dataset": {"train_file": str(tmp_path / "rows.jsonl"), "validation_split": 0.0},
            "training": {
                "output_dir": str(tmp_path / "out"),
                "save_steps": 2,
                "max_steps": 4,
                "per_device_train_batch_size": 2,
            }
            | {"gradient_accumulation_steps": 1, "learning_rate": 1e-3},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        strop.train(
            strop.load_config(
                path, overrides={"finetuning.resume_from_checkpoint": "auto"} if cache == "other" else None
            )
        )
        return tmp_path / "out" / "run"

    run = launch(datetime.date(2026, 11, 28), "one")
    data = json.loads((run / "data.json").read_text())
    assert data["rendering"]["date"] == "2026-11-28"
    # as if killed behind step 2; the next day, with an empty cache
    for folder in ("final", "checkpoint-4"):
        shutil.rmtree(run / folder)
    run = launch(datetime.date(2026, 11, 29), "other")
    again = json.loads((run / "data.json").read_text())
    assert again["fingerprint"] == data["fingerprint"] and again["rendering"]["date"] == "2026-11-28"
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset"]["date"] == "2026-11-28"
    # who names a day gets it
    assert strop.load_config(tmp_path / "config.yaml", overrides={"dataset.date": "2024-02-29"}).dataset.date
    with pytest.raises(strop.errors.ConfigError, match="YYYY-MM-DD"):
        strop.load_config(tmp_path / "config.yaml", overrides={"dataset.date": "yesterday"})
