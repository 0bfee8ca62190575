"""Rows that files of other tools name: which files, splits and columns a configuration of strop has of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strop.errors import ConfigError
from strop.importers import import_file
from strop.importers.key_answers import Fate

FACTORY = "model_name_or_path: m\nstage: {stage}\nfinetuning_type: lora\ncutoff_len: 64\n"
AXOLOTL = "base_model: m\nadapter: lora\nlora_r: 8\nmicro_batch_size: 1\nnum_epochs: 1\nsequence_len: 64\n"
SCRIPT = """
from trl import SFTConfig
from datasets import load_dataset
rows = load_dataset({rows})
arguments = SFTConfig(output_dir="out"{evaluated})
model = AutoModelForCausalLM.from_pretrained("m")
"""
EVALUATED = ', eval_strategy="steps", eval_steps=5'


def imported(text: str, name: str, tool: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """(the keys of `dataset` that say where rows are, what is not carried over)."""
    Path(name).write_text(text)
    found = import_file(Path(name), tool)
    data = {key.partition(".")[2]: value for key, value in found.values.items() if key.startswith("dataset.")}
    others = ("validation_split", "filter_overlength_samples")
    lost = {entry.key: entry.answer.why for entry in found.of(Fate.LEFT)}
    return {key: value for key, value in data.items() if key not in others}, lost


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def of_factory(info: dict[str, Any], lines: str, stage: str = "sft") -> tuple[dict[str, Any], dict[str, str]]:
    Path("data/dataset_info.json").write_text(json.dumps(info))
    return imported(FACTORY.format(stage=stage) + lines, "a.yaml", "llamafactory")


def test_a_version_in_the_name_of_a_data_set_is_no_ending_of_a_file() -> None:
    data, lost = of_factory({"v": {"hf_hub_url": "org/rows-v1.5"}}, "dataset: v\n")
    assert (data, lost) == ({"sources": [{"name": "org/rows-v1.5"}]}, {})


def test_the_hub_goes_before_a_file() -> None:
    data, _ = of_factory({"v": {"hf_hub_url": "org/rows", "file_name": "old.json"}}, "dataset: v\n")
    assert data == {"sources": [{"name": "org/rows"}]}


def test_texts_of_pretraining_are_no_prompts() -> None:
    info = {"c4": {"file_name": "c4.json", "columns": {"prompt": "text"}}}
    assert of_factory(info, "dataset: c4\n", "pt") == ({"train_file": "data/c4.json"}, {})
    info["c4"]["columns"] = {"prompt": "body"}  # type: ignore[assignment]
    data, lost = of_factory(info, "dataset: c4\n", "pt")
    assert data == {"train_file": "data/c4.json"} and "body (text)" in lost["dataset"]


def test_columns_of_two_data_sets_that_differ_are_not_both_carried_over() -> None:
    info = {
        "a": {"file_name": "a.json", "columns": {"prompt": "ask", "response": "reply"}},
        "b": {"file_name": "b.json", "columns": {"prompt": "asked", "response": "reply"}},
    }
    data, lost = of_factory(info, "dataset: a,b\n")
    assert (data["prompt_column"], data["completion_column"]) == ("ask", "reply")
    assert "asked (b)" in lost["dataset"] and "reply" not in lost["dataset"]
    data, lost = of_factory(info, "dataset: a\neval_dataset: b\n")
    assert (data["prompt_column"], data["val_file"]) == ("ask", "data/b.json")
    assert lost.keys() == {"eval_dataset"} and "asked (b)" in lost["eval_dataset"]
    assert of_factory(info, "dataset: a\neval_dataset: a\n")[1] == {}


def test_tags_that_strop_does_not_know_are_said() -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"a": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}}
    assert of_factory(info, "dataset: a\n")[1] == {}
    tags["role_tag"] = "speaker"
    assert "speaker (role_tag)" in of_factory(info, "dataset: a\n")[1]["dataset"]


@pytest.mark.parametrize(
    ("item", "sources", "lost"),
    [
        ("{path: json, data_files: x/a.jsonl}", [{"name": "x/a.jsonl"}], []),
        ("{path: json, data_files: [a.jsonl, b.jsonl], split: train}", [{"name": "a.jsonl"}, {"name": "b.jsonl"}], []),
        ("{path: text, data_files: a.md}", [{"name": "text:a.md"}], []),
        ("{path: csv, data_files: a.csv, split: 'train[:9]'}", [{"name": "a.csv"}], ["datasets.0.split"]),
        ("{data_files: a.jsonl, path: org/rows}", [{"name": "org/rows"}], ["datasets.0.data_files"]),
    ],
)
def test_files_of_a_mixture_are_not_a_data_set_named_json(item: str, sources: list[Any], lost: list[str]) -> None:
    text = f"model_name_or_path: m\nuse_peft: true\npacking: false\ncompletion_only_loss: true\ndatasets: [{item}]\n"
    data, found = imported(text, "a.yaml", "trl")
    assert (data["sources"], list(found)) == (sources, lost)


@pytest.mark.parametrize("files", ["'a/*.jsonl'", "{train: a.jsonl, test: b.jsonl}"])
def test_files_that_cannot_be_told_leave_no_data_set(files: str) -> None:
    item = f"datasets: [{{path: json, data_files: {files}}}]\n"
    with pytest.raises(ConfigError, match="names no data"):
        imported(f"model_name_or_path: m\nuse_peft: true\npacking: false\n{item}", "a.yaml", "trl")
    with pytest.raises(ConfigError, match="names no data"):
        imported(AXOLOTL + item, "b.yaml", "axolotl")


@pytest.mark.parametrize(
    ("rows", "evaluated", "data", "lost"),
    [
        ('"json", data_files={"train": "a.jsonl", "test": "b.jsonl"}', EVALUATED, ("a.jsonl", "b.jsonl"), []),
        ('"json", data_files={"train": "a.jsonl", "test": "b.jsonl"}', "", ("a.jsonl", None), []),
        (
            '"json", data_files={"train": "a.jsonl", "test": ["b.jsonl", "c.jsonl"]}',
            EVALUATED,
            ("a.jsonl", None),
            ["load_dataset.data_files.test"],
        ),
        ('"json", data_files={"good": "a.jsonl", "bad": "b.jsonl"}, split="good"', "", ("a.jsonl", None), []),
        ('"json", data_files="a.jsonl", split="train"', "", ("a.jsonl", None), []),
        ('"json", data_files="a.jsonl", split="train[:9]"', "", ("a.jsonl", None), ["load_dataset.split"]),
        ('"text", data_files="a.md"', "", ("text:a.md", None), []),
    ],
)
def test_files_of_a_script_by_split(rows: str, evaluated: str, data: tuple[str, str | None], lost: list[str]) -> None:
    found, left = imported(SCRIPT.format(rows=rows, evaluated=evaluated), "a.py")
    assert (found["train_file"], found.get("val_file"), list(left)) == (*data, lost)
    assert found.keys() <= {"train_file", "val_file"}


def test_several_files_and_files_of_the_hub_in_a_script() -> None:
    data, _ = imported(SCRIPT.format(rows='"json", data_files=["a.jsonl", "b.jsonl"]', evaluated=""), "a.py")
    assert data == {"sources": ["a.jsonl", "b.jsonl"]}
    data, lost = imported(SCRIPT.format(rows='"org/rows", data_files="a.jsonl"', evaluated=""), "a.py")
    assert data == {"name": "org/rows"} and list(lost) == ["load_dataset.data_files"]


@pytest.mark.parametrize(
    ("item", "data", "lost"),
    [
        ("{path: json, data_files: [a.jsonl, b.jsonl]}", {"sources": [{"name": "a.jsonl"}, {"name": "b.jsonl"}]}, []),
        ("{path: ./rows, data_files: a.jsonl}", {"train_file": "rows/a.jsonl"}, []),
        ("{path: data, data_files: a.jsonl}", {"train_file": "data/a.jsonl"}, []),
        ("{path: json, data_files: a.jsonl, split: train}", {"train_file": "a.jsonl"}, []),
        ("{path: a.jsonl, split: 'train[:9]'}", {"train_file": "a.jsonl"}, ["datasets.0.split"]),
        ("{data_files: a.jsonl, path: org/rows}", {"sources": [{"name": "org/rows"}]}, ["datasets.0.data_files"]),
    ],
)
def test_files_of_axolotl(item: str, data: dict[str, Any], lost: list[str]) -> None:
    found, left = imported(f"{AXOLOTL}datasets: [{item}]\n", "a.yaml", "axolotl")
    assert (found, list(left)) == (data, lost)
