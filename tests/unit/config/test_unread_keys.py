"""Keys that a run does not read are known, and none that somebody gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.config import METHODS, load_config
from strop.config.guidance import is_default
from strop.config.unread_keys import unread

MODEL = [{"huggingface_id": "org/model"}]


def hidden(**overrides: Any) -> set[str]:
    return unread(load_config(overrides={"models": MODEL, **overrides}))


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_this_method_that_are_read_stay(method: str) -> None:
    keys = {key for key in hidden(method=method) if key.startswith("post_training.")}
    config = load_config(overrides={"models": MODEL, "method": method})
    assert keys == {f"post_training.{name}" for name in config.post_training.unread()}
    assert ("training.packing" in hidden(method=method)) is (method != "sft")
    assert ("training.reference_store" in hidden(method=method)) is (
        method in ("sft", "orpo", "simpo", "cpo", "reward", "distill")
    )


def test_adapters_settings_are_read_where_adapters_train() -> None:
    assert "lora.r" in hidden() and "lora.enabled" not in hidden()
    assert "lora.r" not in hidden(**{"lora.enabled": True})
    assert "lora.r" not in hidden(models=[{"huggingface_id": "org/model", "adapter": "org/adapter"}])


def test_what_is_given_is_shown() -> None:
    assert "dataset.chosen_column" in hidden(method="sft")
    assert "dataset.chosen_column" not in hidden(method="sft", **{"dataset.chosen_column": "good"})


@pytest.mark.parametrize("name", ["config.yaml", "default.yaml", "defaults.yaml"])
def test_the_name_of_a_file_makes_no_value_a_default(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "models:\n  - huggingface_id: org/model\npost_training:\n  method: sft\ndataset:\n  chosen_column: good\n"
    Path(name).write_text(text)
    config = load_config(name)
    assert "dataset.chosen_column" not in unread(config)
    assert not is_default(config.origins["dataset.chosen_column"])
    assert is_default(config.origins["training.learning_rate"]) and is_default(config.origins["seed"])
