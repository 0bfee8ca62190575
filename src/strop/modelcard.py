"""The model card of a run: README.md in final/, with the metadata that hubs read. Floor 4.

It says what the model was made from, how, and how good it is; nothing of it is private: of files and folders of this
computer only the last part of their names is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.engine.ending import Ending, number
from strop.errors import StropError
from strop.packages import installed_version
from strop.policy.model.folder import fetch
from strop.redact import redact

PACKAGES = ("strop", "torch", "transformers", "peft", "datasets", "tokenizers")
SECTIONS = ("post_training", "lora", "training", "rollout")
"""Sections whose given settings are listed."""
LEFT_OUT = frozenset({"training.output_dir", "training.mount_dir", "post_training.method", "lora.enabled"})
SHOWN = ("loss", "reward", "rewards/accuracies", "rewards/margins", "samples/win_rate")
"""Metrics of the evaluations, where they have them."""
LICENSE = ("license", "license_name", "license_link")


def model_card(
    config: RunConfig, model: ModelSection, ending: Ending, data: Mapping[str, Any], *, writes: bool = True
) -> str:
    """The text of README.md.

    Args:
        config: the resolved configuration. data: the content of data.json. writes: whether it is a language model, and
            no reward model.
    """
    adapted, base = config.adapts(model), model.huggingface_id
    metadata: dict[str, Any] = dict(_license(model))
    if not _is_local(base):
        metadata |= {"base_model": base, "base_model_relation": "adapter" if adapted else "finetune"}
    if of_hub := [name for name in _sources(config) if not _is_local(name)]:
        metadata["datasets"] = of_hub
    metadata |= {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": "text-generation" if writes else "text-classification",
        "tags": ["strop", config.post_training.method, *(["lora"] if adapted else [])],
    }
    body = "\n".join(_body(config, model, ending, data, adapted=adapted, writes=writes))
    return redact(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{body}\n")


def _body(
    config: RunConfig, model: ModelSection, ending: Ending, data: Mapping[str, Any], *, adapted: bool, writes: bool
) -> Iterator[str]:
    base = public(model.huggingface_id)
    what = "An adapter (LoRA) for" if adapted else "All weights of"
    yield f"# {_cell(model.name)}\n"
    yield f"{what} `{base}`, trained by `{config.post_training.method}` with strop.\n"
    yield "## Data\n"
    for name in _sources(config):
        yield f"- `{public(name)}`"
    kept = data["splits"]["train"]["kept"]
    yield f"\n{kept:,} rows were trained on."
    yield "\n## Settings\n\n| setting | value |\n|---|---|"
    yield from (f"| {key} | {_cell(value)} |" for key, value in _settings(config))
    yield f"\n{ending.reason[:1].upper()}{ending.reason[1:]}; the model is that of step {ending.final_step}.\n"
    yield from _evaluations(ending)
    yield "## Use\n\n```python"
    yield from _usage(adapted=adapted, writes=writes, grown=bool(adapted and model.add_tokens))
    yield "```\n\n## Versions\n"
    yield ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed_version(name)))


def _evaluations(ending: Ending) -> Iterator[str]:
    before, after = ending.metrics.get("eval_at_start"), ending.metrics.get("eval")
    if after is None:
        return
    yield "## Evaluation\n\n| metric | before | after |\n|---|---|---|"
    for name in SHOWN:
        if isinstance(value := after.get(name), int | float):
            first = None if before is None else before.get(name)
            yield f"| {name} | {number(first) if isinstance(first, int | float) else ''} | {number(value)} |"
    yield f"\nOn {after.get('num_groups', 'the')} validation rows that were not trained on.\n"


def _usage(*, adapted: bool, writes: bool, grown: bool) -> Iterator[str]:
    """grown: the base needs rows for new tokens, which peft's own classes give it."""
    kind = "AutoModelForCausalLM" if writes else "AutoModelForSequenceClassification"
    if grown:
        kind = kind.replace("AutoModel", "AutoPeftModel")
        yield f"from peft import {kind}\nfrom transformers import AutoTokenizer\n"
    else:
        yield f"from transformers import {kind}, AutoTokenizer\n"
    yield 'place = "."  # this folder, or the id of this repository'
    yield "tokenizer = AutoTokenizer.from_pretrained(place)"
    comment = "  # needs peft, and brings its base" if adapted else ""
    yield f"model = {kind}.from_pretrained(place){comment}"


def _settings(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """What was given, or was found out when the run began; defaults are left out."""
    for key, value, given in config.leaves():
        listed = given and value is not None and key.split(".")[0] in SECTIONS and key not in LEFT_OUT
        if listed and (config.lora.enabled or not key.startswith("lora.")):
            yield key, value
    yield "seed", config.seed


def _sources(config: RunConfig) -> list[str]:
    """The training data: names of data sets of a hub, or paths."""
    data = config.dataset
    named = [source.name for source in data.sources] if data.sources else [data.name or data.splits_dir]
    return [str(name) for name in ([data.train_file] if data.train_file else named) if name]


def _license(model: ModelSection) -> dict[str, str]:
    """What the card of the base says of its licence."""
    try:
        card = fetch(model.huggingface_id, "README.md", model.revision, model.name, optional=True)
        content = ModelCard.load(card).data.to_dict() if card is not None else {}
    except (StropError, OSError, ValueError):  # a base without a readable card says nothing of its licence
        return {}
    return {name: str(content[name]) for name in LICENSE if isinstance(content.get(name), str)}


def _is_local(name: str) -> bool:
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or os.path.exists(name)


def public(value: str) -> str:
    """A name as others may read it: of a path of this computer its last part."""
    return _cell(Path(value).name if _is_local(value) else value)


def _cell(value: Any) -> str:
    """A value in a cell of a table, or between backticks."""
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", "./", "../"))):
        value = Path(value).name
    elif isinstance(value, tuple | list):
        return ", ".join(_cell(item) for item in value)
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
