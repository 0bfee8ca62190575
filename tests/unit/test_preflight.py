"""What is not there is refused at once: before torch is imported, all of it in one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from strop.config import load_config
from strop.errors import CheckpointError, ConfigError, DataError, ModelError, StropError
from strop.preflight import check

PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def given(tmp_path: Path, model_dir: Path) -> dict[str, Any]:
    """A configuration of which everything is there."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(PAIR) + "\n") * 3)
    return {
        "models": [{"huggingface_id": str(model_dir)}],
        "dataset.train_file": str(rows),
        "post_training.method": "dpo",
    }


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def answers(file: Path) -> Path:
    file.write_text(json.dumps({"prompt": "q", "completion": "yes"}) + "\n")
    return file


WRONG: dict[str, tuple[Any, type[StropError], str]] = {
    "a model": (lambda f, m: {"models": [{"huggingface_id": str(f / "none")}]}, ModelError, "there is no such folder"),
    "a model that is a file": (
        lambda f, m: {"models": [{"huggingface_id": str(m / "config.json")}]}, ModelError, "the path is a file",
    ),
    "a hub id offline": (
        lambda f, m: {"models": [{"huggingface_id": "org/none"}]}, ModelError, "there is no folder 'org/none' here",
    ),
    "an adapter": (
        lambda f, m: {"models": [{"huggingface_id": str(m), "adapter": "./none"}]}, ModelError, "no such folder",
    ),
    "half an adapter": (
        lambda f, m: {"models": [{"huggingface_id": str(m), "adapter": str(adapter(f / "a"))}]},
        ModelError,
        "there is no adapter_model.safetensors",
    ),
    "a reference": (lambda f, m: {"post_training.ref_model_id": "./none"}, ModelError, "reference model none (./none)"),
    "a teacher": (
        lambda f, m: {
            "post_training.method": "distill",
            "post_training.teacher_model_id": "./none",
            "dataset.train_file": str(answers(f / "answers.jsonl")),
        },
        ModelError,
        "teacher model none (./none)",
    ),
    "a file": (lambda f, m: {"dataset.train_file": "none.jsonl"}, DataError, "there is no such file"),
    "a validation file": (lambda f, m: {"dataset.val_file": "none.jsonl"}, DataError, "there is no such file"),
    "split files": (
        lambda f, m: {"dataset.train_file": None, "dataset.splits_dir": "none"}, DataError, "there is no such folder",
    ),
    "a column": (lambda f, m: {"dataset.prompt_column": "question"}, DataError, "'question' is missing"),
    "rows of another method": (lambda f, m: {"post_training.method": "sft"}, DataError, "preference pair"),
    "a checkpoint": (
        lambda f, m: {"finetuning.resume_from_checkpoint": "none"}, CheckpointError, "there is no such folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there_is_refused(name: str, given: dict[str, Any], tmp_path: Path, model_dir: Path) -> None:
    changes, kind, found = WRONG[name]
    config = load_config(overrides={**given, **changes(tmp_path, model_dir)})
    with pytest.raises(kind) as caught:
        check(config)
    assert type(caught.value) is kind and found in str(caught.value)


def test_what_is_there_passes(given: dict[str, Any], model_dir: Path) -> None:
    check(load_config(overrides=given))
    check(load_config(overrides={**given, "post_training.ref_model_id": str(model_dir)}), resume="auto")


def test_weights_are_asked_for_only_where_they_are_needed(given: dict[str, Any], model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    config = load_config(overrides=given)
    check(config, needs_weights=False)
    with pytest.raises(ModelError, match="there are no weights"):
        check(config)
    (model_dir / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickles"):  # no run could ever take them
        check(config, needs_weights=False)


def test_rows_that_may_be_skipped_are_left_to_the_report(given: dict[str, Any]) -> None:
    check(load_config(overrides={**given, "dataset.prompt_column": "question", "dataset.on_error": "skip"}))


def test_all_of_it_is_told_at_once(given: dict[str, Any]) -> None:
    models = [{"huggingface_id": "./one"}, {"huggingface_id": "./two"}]
    config = load_config(overrides={**given, "models": models, "dataset.train_file": "none.jsonl"})
    with pytest.raises(ConfigError) as caught:
        check(config)
    for name in ("(./one)", "(./two)", "none.jsonl"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match="2 things"):
        check(config, model_index=1)


REFUSED = (
    "import sys; from strop.cli import main; code = main(sys.argv[1:]);"
    "sys.exit(f'loaded {sorted(found)}' if (found := {'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets'}"
    " & set(sys.modules)) else code)"
)


@pytest.mark.share(1)
@pytest.mark.parametrize("command", ["train", "train --dry-run", "reference"])
def test_a_wrong_path_is_refused_before_anything_slow_is_imported(
    command: str, given: dict[str, Any], tmp_path: Path
) -> None:
    document = {"models": given["models"], "dataset": {"train_file": "none.jsonl"}, "post_training": {"method": "dpo"}}
    (tmp_path / "c.json").write_text(json.dumps(document))
    line = [*command.split(), "--config", str(tmp_path / "c.json")]
    done = subprocess.run([sys.executable, "-c", REFUSED, *line], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1 and "none.jsonl: there is no such file" in done.stderr, done.stderr
    assert "loaded" not in done.stderr


@pytest.mark.share(6)
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("generate ./none hello", "./none: there is no such folder"),
        ("generate {model} --prompts none.txt", "none.txt: there is no such file"),
        ("generate {model} hello --output {model}/config.json", "config.json: it is there already"),
        ("eval ./none --data {rows}", "./none: there is no such folder"),
        ("eval {model} ./none --data {rows}", "./none: there is no such folder"),
        ("eval {model} --data {rows} --method dpo --reference ./none", "./none: there is no such folder"),
        ("eval {model} --data none.jsonl", "none.jsonl: there is no such file"),
        ("merge ./none --output-dir merged", "./none: there is no such folder"),
        ("merge {model} --output-dir merged", "it is a whole model, without an adapter"),
        ("merge {adapter} --output-dir merged --base ./none", "(./none): there is no such folder"),
        ("merge {adapter} --output-dir {model}", "the folder is in use"),
        ("convert ./none --to consolidated --output-dir other", "./none: there is no such folder"),
        ("convert ./none --to hf --output-dir other", "./none: there is no such folder"),
        ("convert {model} --to hf --output-dir other", "there is no consolidated.00.pth"),
        ("convert {meta} --to consolidated --output-dir other", "it has this layout already"),
        ("convert {adapter} --to consolidated --output-dir other", "it is an adapter"),
        ("convert {model} --to consolidated --output-dir {model}", "it is the folder that is read"),
        ("push ./none --repo me/x", "./none: there is no such folder"),
        ("push {model} --repo a/b/c", "a hub takes no such name"),
        ("push {model} --repo me/x", "there is no login for the hub"),
        ("replay ./none --step 3", "none: there is no such folder"),
    ],
)
def test_commands_on_models_refuse_a_wrong_path_before_anything_slow_is_imported(
    line: str, told: str, model_dir: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("rows.jsonl", "adapter", "meta")}
    places["rows.jsonl"].write_text(json.dumps({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}))
    for folder, files in {
        "adapter": {"adapter_config.json": {"base_model_name_or_path": str(model_dir)}},
        "meta": {"params.json": {}, "tokenizer.json": {}, "consolidated.00.pth": {}},
    }.items():
        places[folder].mkdir()
        for name, content in files.items():
            (places[folder] / name).write_text(json.dumps(content))
    (places["adapter"] / "adapter_model.safetensors").write_bytes(b"")
    paths = {name.partition(".")[0]: str(path) for name, path in places.items()}
    words = [word.format(model=model_dir, **paths) for word in line.split()]
    away = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *words],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd=tmp_path,
        env=away,
    )
    assert told in done.stderr and "loaded" not in done.stderr, done.stderr
    assert done.returncode == 1
