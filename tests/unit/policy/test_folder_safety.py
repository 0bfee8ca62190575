"""Model folders as nobody wants them: one message with the file's name, or a model; never anything else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop import time_limit
from strop.config.sections import LoraSection, ModelSection
from strop.errors import ModelError
from strop.manifest import MANIFEST, seal
from strop.policy.model import adapter_settings
from strop.policy.model.configuration import model_config, quiet
from strop.policy.model.folder import check_adapter, inspect_config
from strop.policy.model.folder_safety import check_numbers
from strop.policy.model.load import load_model
from strop.policy.model.tokenizer import load_tokenizer

Make = Callable[..., Any]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def section(folder: Path | str) -> ModelSection:
    return ModelSection(name="run", huggingface_id=str(folder))


def changed(folder: Path, **changes: Any) -> ModelSection:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return section(folder)


@pytest.mark.parametrize("name", [*FILES, "model.safetensors", "special_tokens_map.json", "vocab.txt"])
def test_links_out_of_a_folder_are_refused_for_every_file(name: str, model_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text((model_dir / name).read_text() if name.endswith("jinja") else "{}")
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).symlink_to(elsewhere)
    with pytest.raises(ModelError, match=rf"{name} is a link that leads out of the folder"):
        load_tokenizer(section(model_dir))


def test_links_of_the_hubs_cache_are_followed(model_dir: Path, tmp_path: Path) -> None:
    blobs, commit = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    commit.mkdir(parents=True)
    for number, file in enumerate(sorted(model_dir.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (commit / file.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert len(load_tokenizer(section(commit))) > 0


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_a_link_that_is_a_loop_is_one_error(name: str, model_dir: Path) -> None:
    (model_dir / name).unlink()
    (model_dir / name).symlink_to(name)
    with pytest.raises(ModelError, match=f"{name} is a link that leads nowhere"):
        load_tokenizer(section(model_dir))


@pytest.mark.parametrize("path", ["/" + "x/" * 3000, "/" + "y" * 5000], ids=["deep", "long"])
def test_a_path_that_no_system_takes_is_one_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        inspect_config(section(path))
    with pytest.raises(ModelError, match="there is no such folder"):
        check_adapter(ModelSection(name="run", huggingface_id=str(tmp_path), adapter=path))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "n_layer"])
@pytest.mark.parametrize("value", [10_000_000, 10**30, -1])
def test_numbers_without_end_are_refused_before_anything_is_built(key: str, value: int, model_dir: Path) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {key} is "):
        model_config(changed(model_dir, **{key: value}))
    with pytest.raises(ModelError, match=rf"config\.json: {key} is "):
        model_config(changed(model_dir, **{key: 1}, text_config={key: value}))


@pytest.mark.parametrize("value", [0, -1, -10000.0, float("nan")])
@pytest.mark.parametrize("key", ["rope_theta", "max_position_embeddings", "partial_rotary_factor", "factor"])
def test_positions_that_mean_nothing_are_refused(key: str, value: float, model_dir: Path) -> None:
    if key == "max_position_embeddings" and value != value:
        value = 0.5
    with pytest.raises(ModelError, match=rf"config\.json: {key} is (.|\n)*expected: a number"):
        model_config(changed(model_dir, **{key: value}))
    with pytest.raises(ModelError, match=rf"config\.json: {key} is "):
        model_config(changed(model_dir, **{key: 8}, rope_parameters={"full_attention": {key: value}}))


@pytest.mark.nightly
def test_no_model_has_such_numbers_by_default() -> None:
    from transformers import CONFIG_MAPPING

    found = 0
    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]().to_dict()
        except Exception:  # noqa: BLE001 - some are only made with arguments, or need packages that are not here
            continue
        check_numbers(config, kind)
        found += 1
    assert found > 200


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 0}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"hidden_act": "nope"}],
    ids=str,
)
def test_a_configuration_that_describes_no_model_is_one_error(changes: dict[str, Any], model_dir: Path) -> None:
    import torch

    with pytest.raises(ModelError):
        load_model(changed(model_dir, **changes), dtype=torch.float32)


def test_how_results_are_handed_over_is_not_the_files_business(model_dir: Path) -> None:
    assert model_config(changed(model_dir, return_dict=False)).return_dict


def test_whoever_asks_for_a_configuration_may_change_it(model_dir: Path) -> None:
    """It is kept by what stands in the file."""
    first = model_config(section(model_dir))
    first.vocab_size += 1
    assert model_config(section(model_dir)).vocab_size == first.vocab_size - 1
    assert model_config(changed(model_dir, vocab_size=77)).vocab_size == 77


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_folder_with_a_manifest_is_compared_with_it(name: str, model_dir: Path) -> None:
    import torch

    def load() -> None:
        load_tokenizer(section(model_dir))
        load_model(section(model_dir), dtype=torch.float32)

    seal(model_dir, 3, {})
    load()
    content = bytearray((model_dir / name).read_bytes())
    content[-2] ^= 1  # of a weight, of a text
    (model_dir / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"it is not what was written: {name}: (.|\n)*{MANIFEST}"):
        load()
    (model_dir / MANIFEST).write_text('{"somebody": "else\'s"}')
    if name == "model.safetensors":
        load()


EXPLODES = r"(([a-z_.0-9]+)+)+!"


@pytest.mark.nightly
@pytest.mark.skipif(not time_limit.CAN_FORK, reason="nothing is tried where no process can be copied")
@pytest.mark.parametrize("where", ["target_modules", "rank_pattern", "exclude_modules"])
def test_expressions_of_an_adapter_that_never_end_are_refused(
    where: str, model_dir: Path, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    with quiet():
        get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    file = folder / "adapter_config.json"
    model = ModelSection(name="run", huggingface_id=str(model_dir), adapter=str(folder))
    assert adapter_settings.adapters_of(LoraSection(), model) is not None
    value = {EXPLODES: 4} if where == "rank_pattern" else EXPLODES
    file.write_text(json.dumps({**json.loads(file.read_text()), where: value}))
    monkeypatch.setattr(adapter_settings, "PATTERN_SECONDS", 1.0)
    with pytest.raises(ModelError, match=r"adapter_config\.json takes more than 1 seconds of processor time"):
        adapter_settings.adapters_of(LoraSection(), model)


def test_random_merges_are_switched_off(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = model_dir / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.5
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(section(model_dir))
    assert "leaves out merges at random (dropout 0.5)" in caplog.text
    text = "the quick brown fox jumps over the lazy dog " * 20
    assert len({tuple(tokenizer(text)["input_ids"]) for _ in range(5)}) == 1
