"""A folder with consolidated.00.pth is trained as its transformers' twin, and converted once."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import strop
from strop.cli import main
from strop.errors import ModelError
from strop.export.convert import to_consolidated
from strop.export.converted_bases import in_transformers, with_converted


@pytest.fixture
def place(tmp_path: Path, make_model: Any, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in both layouts, rows, and a cache of its own."""
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "hf")
    make_tokenizer().save_pretrained(tmp_path / "hf")
    to_consolidated(str(tmp_path / "hf"), tmp_path / "meta")
    rows = [{"prompt": f"question {i}", "completion": "yes " * (1 + i % 3)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.nightly
def test_it_trains_as_its_twin_and_is_converted_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(place)
    caplog.set_level(logging.INFO, logger="strop")
    flags = [
        "--method",
        "sft",
        "--train-file",
        "rows.jsonl",
        "--max-steps",
        "2",
        "--lora.r",
        "4",
        "--dataset.validation-split",
    ]
    flags += ["0", "--learning-rate", "1e-2"]
    names = {"hf": "hf", "meta": "meta", "file": "meta/consolidated.00.pth"}
    for out, model in names.items():
        flag = "--ckpt_paths" if out == "file" else "--model"
        assert main(["train", flag, model, *flags, "--output-dir", out + "-runs"]) == 0
    weights = [load_file(next(place.glob(f"{out}-runs/*/final/adapter_model.safetensors"))) for out in names]
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())
    assert (place / "file-runs/meta/final").is_dir()  # named by the folder
    assert sum("converting it" in record.message for record in caplog.records) == 1
    base = json.loads((place / "meta-runs/meta/final/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base, "model.safetensors").is_file()
    assert not (place / "meta/config.json").exists()
    assert main(["generate", "meta", "hello", "--max-new-tokens", "2"]) == 0


def test_another_content_is_another_model(place: Path) -> None:
    first = in_transformers(str(place / "meta"))
    assert in_transformers(str(place / "meta")) == first == in_transformers(first)
    weights = torch.load(place / "meta/consolidated.00.pth", weights_only=True)
    weights["norm.weight"] += 1
    torch.save(weights, place / "meta/consolidated.00.pth")
    second = in_transformers(str(place / "meta"))
    assert second != first
    shutil.copytree(place / "meta", place / "copy")
    assert in_transformers(str(place / "copy")) == second


def test_the_reference_may_be_one(place: Path) -> None:
    keys = {
        "models": [{"huggingface_id": str(place / "hf"), "name": "run"}],
        "post_training": {"method": "dpo", "ref_model_id": str(place / "meta")},
        "dataset.train_file": str(place / "pairs.jsonl"),
        "training": {"max_steps": 1, "output_dir": str(place), "warmup_steps": 0},
    }
    pairs = [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no no"} for i in range(4)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    strop.train(strop.load_config(overrides=keys))
    (first, *_) = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_another_template_is_another_model_and_is_copied(place: Path) -> None:
    first = in_transformers(str(place / "meta"))
    (place / "meta/additional_chat_templates").mkdir()
    (place / "meta/additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    second = in_transformers(str(place / "meta"))
    assert second != first and Path(second, "additional_chat_templates/tool_use.jinja").is_file()
    to_consolidated(second, place / "again")
    assert (place / "again/additional_chat_templates/tool_use.jinja").is_file()


def test_the_teacher_may_be_one(place: Path) -> None:
    settings = {"method": "distill", "teacher_model_id": str(place / "meta")}
    keys = {"models": [{"huggingface_id": str(place / "hf")}], "post_training": settings}
    found = with_converted(strop.load_config(overrides=keys))
    assert Path(found.post_training.teacher_model_id, "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["tokenizer.json", "params.json"])
def test_what_is_missing_is_told(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "meta" / name).unlink()
    file = str(place / "meta/consolidated.00.pth")
    with pytest.raises(ModelError, match=f"there is no {name} beside consolidated"):
        in_transformers(file)
    assert main(["train", "--model", file, "--train-file", str(place / "rows.jsonl"), "--method", "sft"]) == 1
    assert f"there is no {name} beside consolidated.00.pth" in capsys.readouterr().err
    assert not list((place / "cache").glob("models/*"))
