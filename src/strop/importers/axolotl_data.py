"""The data of axolotl's files, and its chat templates. Floor 2, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.config.yamlfile import KeyPath
from strop.importers.key_answers import Fate, KeyAnswer, View, idle, left, translated
from strop.importers.trl_data import FORMATS, PART_OF_A_SET, named_files, source_name, split_of_file

TEMPLATES: Mapping[str, str] = {
    "llama3": "llama3_instruct",
    "chatml": "chatml",
    "mistral_v1": "mistral",
    "gemma": "gemma",
    "qwen_25": "qwen2.5_instruct",
}

FILES = (".json", ".jsonl", ".csv", ".parquet", ".jsonl.gz")

NATIVE: Mapping[str, str] = {
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_prompt": "prompt",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field": "text",
}
"""What a field is called there -> the column that strop reads by itself."""

TOLD: Mapping[str, str] = {
    "field_chosen": "dataset.chosen_column",
    "field_rejected": "dataset.rejected_column",
    "field_prompt": "dataset.prompt_column",
}

PAIRS = ("dpo", "ipo", "orpo", "simpo", "cpo", "reward")
TURNS_OF_PAIRS = (
    "beside chosen and rejected turns, strop reads the turns of the prompt from the column conversations: rename it "
    "(docs/data.md)"
)
READ_TYPES = ("alpaca", "chat_template", "sharegpt", "completion", "input_output", "pretrain", "chat_template.default")


def template(value: Any, view: View) -> KeyAnswer:
    if value == "tokenizer_default" or str(value).startswith("tokenizer_default"):
        return idle("the tokenizer's own is the default")
    if str(value) in TEMPLATES:
        return translated({"dataset.template": TEMPLATES[str(value)]})
    return left("the model's own chat template is taken; name another in dataset.template (docs/templates.md)")


def datasets(value: Any, view: View) -> Mapping[KeyPath, KeyAnswer]:
    """`datasets:`, a list of mappings with path, type, split, name, data_files and names of fields."""
    found: dict[KeyPath, KeyAnswer] = {}
    sources: list[dict[str, Any]] = []
    for i, item in enumerate(value if isinstance(value, list) else []):
        if isinstance(item, Mapping):
            sources += _sources(i, item, found, view)
    if not sources or any("name" not in source for source in sources):
        return {p: a for p, a in found.items() if p[-1] not in ("path", "data_files") or a.fate is Fate.LEFT}
    file = sources[0]["name"] if len(sources) == 1 and set(sources[0]) == {"name"} else ""
    first = next(p for p, a in found.items() if p[-1] in ("path", "data_files") and a.fate is not Fate.LEFT)
    values = {"dataset.train_file": file} if Path(file).suffix in FILES else {"dataset.sources": sources}
    found[first] = translated(values)
    return found


def _sources(i: int, item: Mapping[str, Any], found: dict[KeyPath, KeyAnswer], view: View) -> list[dict[str, Any]]:
    """What one of the list names, of which each of several files is a source; answers its keys."""
    source: dict[str, Any] = {}
    files = _files(item, view)
    for key, told in item.items():
        match key:
            case "path" if files:
                found[i, key] = idle("data_files names the file")
            case "path" if told not in FORMATS:
                source["name"] = str(told)
                found[i, key] = idle("in dataset.sources")
            case "data_files" if files:
                found[i, key] = idle("in dataset.sources")
            case "data_files" if told is not None:
                found[i, key] = left(PART_OF_A_SET)
            case "split" if files or Path(str(item.get("path"))).suffix in FILES:
                found[i, key] = split_of_file(told)
            case "name" | "split" if told is not None:
                source["subset" if key == "name" else key] = told
                found[i, key] = idle(f"in dataset.sources as {'subset' if key == 'name' else key}")
            case "ds_type":
                found[i, key] = idle("the ending of the file says it")
            case "type":
                found[i, key] = _type(told, item, view)
            case "chat_template" if isinstance(told, str):
                found[i, key] = template(told, view)
            case "train_on_eos" if told in ("turn", "all", None):
                found[i, key] = idle("every trained answer ends with its end of turn, which is trained")
            case "roles_to_train" if told in (["assistant"], ["gpt"], ["gpt", "assistant"]):
                found[i, key] = idle("answers of the assistant are trained")
            case _ if key in NATIVE:
                found[i, key] = _field(key, told, view)
    return [{**source, "name": file} for file in files] or [source]


def _files(item: Mapping[str, Any], view: View) -> list[str]:
    """The files that `data_files` names, which are relative to a folder that stands beside them. Files of a data set of
    the hub are none that strop could read."""
    files, home = named_files(item.get("data_files")), item.get("path")
    if home in (*FORMATS, None):
        return [source_name(file, str(home)) for file in files]
    folder = str(home)
    is_folder = folder.startswith((".", "/", "~")) or any((at / folder).is_dir() for at in (Path(), view.folder))
    return [str(Path(folder) / file) for file in files] if is_folder else []


def _type(told: Any, item: Mapping[str, Any], view: View) -> KeyAnswer:
    if str(told).startswith("chat_template") and view.method in PAIRS and item.get("field_messages") is None:
        return left(f"there the turns of the prompt are in the column messages; {TURNS_OF_PAIRS}")
    if told in READ_TYPES or told is None:
        return idle("strop reads rows of this shape by themselves (docs/data.md)")
    return left("strop reads rows by the names of their columns (docs/data.md); rename those that it does not find")


def _field(key: str, told: Any, view: View) -> KeyAnswer:
    if key == "field_messages" and view.method in PAIRS and told not in ("conversations", None):
        return left(TURNS_OF_PAIRS)
    if told in (NATIVE[key], "conversations", None):
        return idle(f"strop reads the column {told} by itself")
    if key in TOLD:
        return translated({TOLD[key]: told})
    return left(f"strop reads {NATIVE[key]}: rename the column (docs/data.md)")


def test_datasets(value: Any, view: View) -> Mapping[KeyPath, KeyAnswer]:
    items = value if isinstance(value, list) else []
    if len(items) == 1 and isinstance(items[0], Mapping):
        files = _files(items[0], view)
        file = files[0] if len(files) == 1 else None if "data_files" in items[0] else items[0].get("path")
        key = "data_files" if files else "path"
        if isinstance(file, str) and Path(file).suffix in FILES:
            found: dict[KeyPath, KeyAnswer] = {(0, str(name)): idle("as for datasets") for name in items[0]}
            found[0, key] = translated({"dataset.val_file": file})
            return found
    return {}
