"""`strop init`: what it writes is a configuration that fits the rows, and nothing is replaced or guessed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.cli import main
from strop.config import load_config
from strop.machine import machine_named
from strop.modelrows import ModelRows

PAIRS = [{"prompt": f"question {i}", "chosen": "yes " * (1 + i % 9), "rejected": "no maybe"} for i in range(40)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "dpo": PAIRS,
    "kto": [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(PAIRS)],
    "sft": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def written(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / 'rows, of: "mine" # 1.jsonl'  # what YAML reads otherwise where it is not quoted
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


@pytest.mark.parametrize("method", ROWS)
def test_what_is_written_fits_the_rows(
    method: str, write: Callable[..., Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The method is that of their shape, no row is cut, and half the limit would cut some."""
    data, path = write(ROWS[method]), tmp_path / "strop.yaml"
    asked = ["init", "--model", str(model_dir), "--data", str(data), "--output", str(path)]
    assert main(asked) == 0
    assert f"strop train --config {path}" in capsys.readouterr().out
    config = load_config(path)
    assert config.post_training.method == method
    assert config.dataset.train_file == str(data) and config.models[0].huggingface_id == str(model_dir)
    loaded = ModelRows.of(config, config.models[0]).load()
    counts = loaded.report.splits
    assert sum(c.kept for c in counts.values()) == len(PAIRS)
    assert not [c for c in counts.values() if c.changes["prompts_cut"] or c.changes["completions_cut"]]
    longest = max(s["lengths"]["total"]["max"] for s in loaded.report.statistics.values())
    assert longest <= config.training.max_seq_length < longest + 64 or config.training.max_seq_length == 64


def test_a_file_that_is_there_is_not_replaced(
    write: Callable[..., Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "strop.yaml"
    path.write_text("mine")
    assert main(["init", "--model", str(model_dir), "--data", str(write(PAIRS)), "--output", str(path)]) == 1
    assert path.read_text() == "mine" and "there is a file of this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"a": 1, "b": "x"}], "the shape of no method"),
        ([], "no"),
    ],
)
def test_rows_of_no_shape_are_refused(
    rows: list[dict[str, Any]],
    words: str,
    write: Callable[..., Path],
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "strop.yaml"
    assert main(["init", "--model", str(model_dir), "--data", str(write(rows)), "--output", str(path)]) == 1
    assert words in capsys.readouterr().err and not path.exists()


def test_nobody_is_asked_where_nobody_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--model", "org/model"]) == 1
    assert "--data is missing" in capsys.readouterr().err


SHAPES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "pairs": ("dpo", PAIRS),
    "pairs of messages": (
        "dpo",
        [
            {
                "prompt": [{"role": "user", "content": r["prompt"]}],
                "chosen": [{"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
            for r in PAIRS
        ],
    ),
    "labels": ("kto", ROWS["kto"]),
    "completions": ("sft", ROWS["sft"]),
    "messages": (
        "sft",
        [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "yes"}]}
            for r in PAIRS
        ],
    ),
    "alpaca": ("sft", [{"instruction": r["prompt"], "input": "", "output": "yes"} for r in PAIRS]),
    "texts": ("sft", [{"text": r["prompt"]} for r in PAIRS]),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_dry_run(
    shape: str, write: Callable[..., Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal, from flags alone."""
    method, rows = SHAPES[shape]
    path = tmp_path / "s.yaml"
    assert main(["init", "--model", str(model_dir), "--data", str(write(rows)), "--output", str(path)]) == 0
    assert load_config(path).post_training.method == method
    capsys.readouterr()
    assert main(["train", "--config", str(path), "--dry-run", "--no-time"]) == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_the_tokenizer_is_read_once(
    write: Callable[..., Path], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two methods cannot read the rows before one can."""
    from strop import modelrows

    read, times = modelrows.read_tokenizer, []
    monkeypatch.setattr(modelrows, "read_tokenizer", lambda *a, **k: times.append(1) or read(*a, **k))
    data = write(ROWS["sft"])
    assert main(["init", "--model", str(model_dir), "--data", str(data), "--output", str(tmp_path / "s.yaml")]) == 0
    assert len(times) == 1


def test_three_questions_are_asked_on_a_terminal(
    write: Callable[..., Path], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model, the rows, and what for; the last may be left to the shape of the rows."""
    answers = iter([str(model_dir), str(write(PAIRS)), ""])
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(answers))
    path = tmp_path / "s.yaml"
    assert main(["init", "--output", str(path)]) == 0
    assert len(asked) == 3 and "which method" in asked[2].lower()
    assert load_config(path).post_training.method == "dpo"


@pytest.fixture
def large(model_dir: Path, tmp_path: Path) -> Path:
    """A model of 6.5 billion weights, without them."""
    folder = tmp_path / "large"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "head_dim": 128}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("device", "quant"), [("h100", "none"), ("t4", "4bit")])
def test_the_base_is_in_4_bits_where_it_does_not_fit(
    device: str, quant: str, write: Callable[..., Path], large: Path, tmp_path: Path
) -> None:
    """All weights fit neither, and the file says so; what is written fits by the dry run's own prediction."""
    path = tmp_path / "strop.yaml"
    asked = ["init", "--model", str(large), "--data", str(write(PAIRS)), "--output", str(path), "--device", device]
    assert main(asked) == 0
    text = path.read_text()
    config = load_config(path)
    assert (config.models[0].quant, config.lora.enabled) == (quant, True)
    with_adapters, with_all = re.findall(r"# with (?:adapters|all weights): (.*)", text)
    assert re.fullmatch(r"[\d.e+]+ GiB of memory are predicted", with_adapters) and with_all.endswith("too much")
    assert machine_named(device).name in text


def test_the_memory_is_that_of_the_dry_run(
    write: Callable[..., Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "strop.yaml"
    device = ["--device", "h100"]
    assert main(["init", "--model", str(model_dir), "--data", str(write(PAIRS)), "--output", str(path), *device]) == 0
    (said,) = re.findall(r"# with adapters: ([\d.]+) GiB", path.read_text())
    assert main(["train", "--config", str(path), "--dry-run", "--no-time", *device]) == 0
    (predicted,) = re.findall(r"predicted peak memory: ([\d.]+) GiB", capsys.readouterr().out)
    assert float(said) == pytest.approx(float(predicted), rel=0.05)
