"""The model card in final/: what a hub reads, what a person needs, and nothing private."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from strop.engine.ending import Ending
from strop.modelcard import model_card, public


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_card_lies_in_final(runs: Any, adapted: bool) -> None:
    run = runs({"r": 4} if adapted else {}, max_steps=2)
    card = ModelCard.load(run.path / "final" / "README.md")
    assert card.data.library_name == ("peft" if adapted else "transformers")
    assert card.data.pipeline_tag == "text-generation" and {"strop", "dpo"} <= set(card.data.tags)
    text = card.text
    assert f"| training.max_steps | {run.config['training']['max_steps']} |" in text
    after = json.loads((run.path / "result.json").read_text())["metrics"]["eval"]
    assert f"| {after['loss']:.4f} |" in text
    for private in (str(run.path), str(Path.home()), str(run.path.parents[1])):
        assert private not in card.content
    assert not re.search(r"(^|[\s`(|])/\w+/", card.content)  # no absolute path
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code.replace('"."', repr(str(run.path / "final"))), scope := {})
    assert scope["model"].num_parameters() > 0


def test_the_licence_of_the_base_is_carried_over(runs: Any, tmp_path: Path) -> None:
    config = runs.config()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: theirs\nlicense_link: https://example.org/l\ntags: [x]\n---\n# Base\n"
    )
    ending = Ending("all 2 steps are done", False, 2, 2, 2, {}, None)
    data = {"splits": {"train": {"kept": 3}}}
    model = config.models[0].model_copy(update={"huggingface_id": str(tmp_path / "base")})
    card = ModelCard(model_card(config, model, ending, data))
    assert card.data.license == "other" and card.data.license_name == "theirs"
    assert card.data.to_dict().get("base_model") is None and "`base`" in card.text
    other = ModelCard(model_card(config, model.model_copy(update={"huggingface_id": "org/base"}), ending, data))
    assert other.data.base_model == "org/base" and other.data.license is None


def test_paths_and_secrets_stay_here(runs: Any, tmp_path: Path) -> None:
    secret = "hf_" + "a1B2c3D4e5" * 3
    ending = Ending(f"stopped: {secret}", False, 2, 2, 2, {}, None)
    config = runs.config(ref_model_id=str(tmp_path / "private" / "reference"))
    text = model_card(config, config.models[0], ending, {"splits": {"train": {"kept": 3}}})
    assert secret not in text and str(tmp_path) not in text and "| post_training.ref_model_id | reference |" in text
    config = runs.config({"dataset.sources": ["org/data", f"jsonl:{tmp_path}/rows.jsonl"], "train_file": None})
    text = model_card(config, config.models[0], ending, {"splits": {"train": {"kept": 3}}})
    assert ModelCard(text).data.datasets == ["org/data"] and "- `rows.jsonl`" in text and str(tmp_path) not in text
    assert public("jsonl:/home/me/rows.jsonl") == "rows.jsonl" and public("org/data") == "org/data"
