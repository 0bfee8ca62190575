"""Keys of `dataset` beyond one file: sources, templates, workers, the limit to what may be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from strop.data import crew
from strop.errors import DataError


def test_dataset__completion_column(runs: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in runs.files["singles"].read_text().splitlines()]
    file = tmp_path / "renamed.jsonl"
    file.write_text("".join(json.dumps({"prompt": r["prompt"], "answer": r["completion"]}) + "\n" for r in rows))
    renamed = runs.prepare(method="sft", train_file=str(file), completion_column="answer")
    assert renamed.data.report.fingerprint == runs.prepare(method="sft").data.report.fingerprint


def test_dataset__sources(runs: Any) -> None:
    file = str(runs.files["pairs"])
    run = runs({"dataset.sources": [{"name": file, "weight": 2.0}, f"jsonl:{file}"], "train_file": None}, max_steps=1)
    assert run.data["splits"]["train"]["rows_read"] + run.data["splits"]["eval"]["rows_read"] == 32
    kept = runs.prepare({"dataset.sources": [{"name": file, "weight": 2.0}], "train_file": None}, validation_split=0)
    assert len(kept.data.train) == 32


def test_dataset__template(runs: Any) -> None:
    run = runs(template="zephyr", max_steps=1)
    assert "<|user|>" in (run.path / "final" / "chat_template.jinja").read_text()
    assert run.data["rendering"]["template"] == "zephyr"


def test_dataset__streaming(runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(runs.files["pairs"].read_text())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    asked = []
    load_dataset = datasets.load_dataset

    def watched(*arguments: Any, **how: Any) -> Any:
        asked.append(how.get("streaming", False))
        return load_dataset(*arguments, **how)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    data = runs.prepare({"dataset.name": str(folder), "train_file": None, "dataset.streaming": True}).data
    assert asked == [True] and data.report.fingerprint == runs.prepare().data.report.fingerprint


def test_dataset__num_workers(runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    monkeypatch.setattr(crew, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(crew, "ALONE", 1)
    started = []
    pool = crew.ProcessPoolExecutor
    monkeypatch.setattr(crew, "ProcessPoolExecutor", lambda n, *rest: started.append(n) or pool(n, *rest))
    assert runs.prepare(num_workers=3).data.report.fingerprint and started == [3]


def test_dataset__max_dropped_fraction(runs: Any, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text("{\n" * 2 + runs.files["pairs"].read_text())
    with pytest.raises(DataError, match="2 of 18 rows are lost"):
        runs.prepare(train_file=str(file), on_error="skip")
    data = runs.prepare(train_file=str(file), on_error="skip", max_dropped_fraction=0.2).data
    assert len(data.rejected) == 2
