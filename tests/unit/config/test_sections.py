"""The schema itself, as Python uses it: strictness, ranges, rules between keys, settings that nobody reads."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from strop.config import (
    METHODS,
    DatasetSection,
    DpoSettings,
    FinetuningSection,
    GpuSection,
    LoraSection,
    ModelSection,
    RunConfig,
    Section,
    SftSettings,
    TrainingSection,
    load_config,
)
from strop.config.base_section import PATHS
from strop.config.methods import NEUTRAL
from strop.config.schema import KEYS
from strop.errors import ConfigError

ONE = (ModelSection(huggingface_id="org/model"),)


def refused(section: type[Section], **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (TrainingSection, {"num_epochs": True}),
        (TrainingSection, {"num_epochs": "1"}),
        (TrainingSection, {"num_epochs": 1.0}),
        (TrainingSection, {"num_epochs": 0}),
        (TrainingSection, {"num_epochs": -1}),
        (TrainingSection, {"num_epochs": 10**30}),
        (TrainingSection, {"bf16": 1}),
        (TrainingSection, {"bf16": "true"}),
        (TrainingSection, {"learning_rate": "1e-5"}),
        (TrainingSection, {"learning_rate": True}),
        (TrainingSection, {"learning_rate": float("nan")}),
        (TrainingSection, {"learning_rate": float("inf")}),
        (TrainingSection, {"learning_rate": 10**400}),
        (TrainingSection, {"gradient_checkpointing": 1.5}),
        (TrainingSection, {"gradient_checkpointing": 0.0}),
        (TrainingSection, {"max_seq_length": 100, "max_prompt_length": 100}),
        (TrainingSection, {"bf16": True, "fp16": True}),
        (TrainingSection, {"warmup_steps": 1, "warmup_ratio": 0.1}),
        (TrainingSection, {"unknown": 1}),
        (DatasetSection, {"name": ""}),
        (DatasetSection, {"name": "  "}),
        (DatasetSection, {"name": "a\0b"}),
        (DatasetSection, {"name": "\ud800"}),
        (DatasetSection, {"train_file": "${HOME}/data.jsonl"}),
        (DatasetSection, {"subset": "train[:10%]"}),
        (GpuSection, {"device_ids": [0, 0]}),
        (GpuSection, {"device_ids": [-1]}),
        (GpuSection, {"device_ids": []}),
        (GpuSection, {"device_ids": 0}),
        (FinetuningSection, {"metric_for_best_model": "eval loss"}),
        (ModelSection, {"huggingface_id": ""}),
        (ModelSection, {"huggingface_id": "/"}),
        (ModelSection, {"huggingface_id": "a", "name": "a/b"}),
        (ModelSection, {"huggingface_id": "a", "name": "a\\b"}),
        (ModelSection, {"huggingface_id": "a", "name": ".."}),
        (ModelSection, {"huggingface_id": "a", "name": "a\nb"}),
        (ModelSection, {"huggingface_id": "a", "name": "x" * 300}),
        (RunConfig, {"models": []}),
        (RunConfig, {"models": ONE, "seed": -1}),
        (RunConfig, {"models": ONE, "preset": "cpu"}),  # presets are applied by load_config
    ],
)
def test_refused(section: type[Section], values: dict[str, Any]) -> None:
    refused(section, **values)


@pytest.mark.parametrize("key", ["output_dir", "mount_dir"])
@pytest.mark.parametrize(
    "folder",
    [
        "/",
        "//",
        "..",
        "../..",
        "../../",
        "./..",
        "~",
        "$HOME/x",
        "/etc",
        "/etc/strop",
        "/usr",
        "/usr/bin/x",
        "/home",
        "",
        " ",
    ],
)
def test_output_folders_that_are_a_slip(key: str, folder: str) -> None:
    assert key in refused(TrainingSection, **{key: folder})


def test_links_are_followed_before_a_folder_is_judged(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/etc")
    assert "/etc" in refused(TrainingSection, output_dir=str(tmp_path / "out"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    TrainingSection(output_dir=str(tmp_path / "runs"))


@pytest.mark.parametrize(
    "folder", [".", "./outputs", "outputs/a", "../outputs", "~/runs", "/dev/shm/runs", "/mnt/x", "a b", "ä"]
)
def test_output_folders_that_are_fine(folder: str) -> None:
    assert TrainingSection(output_dir=folder).output_dir == folder


def test_secrets_are_refused_and_not_repeated() -> None:
    for secret in ("hf_" + "a1B2" * 9, "https://me:pass-word@host/data", "AKIA" + "A1B2" * 4):
        message = refused(DatasetSection, name=secret)
        assert "token or a password" in message and secret not in message


def test_null_means_the_default_where_a_key_does_not_take_null() -> None:
    nulls = TrainingSection(num_epochs=None, output_dir=None, max_prompt_length=None)  # type: ignore[arg-type]
    assert (nulls.num_epochs, nulls.output_dir) == (1, "./outputs")
    assert nulls.max_prompt_length is None  # it takes null
    refused(TrainingSection, num_epoch=None)


def test_defaults_that_follow_other_keys() -> None:
    assert ModelSection(huggingface_id="org/model").name == "model"
    assert ModelSection(huggingface_id="./models/base/").name == "base"
    assert ModelSection(huggingface_id="C:\\models\\base").name == "base"
    assert LoraSection(r=8).lora_alpha == 16
    assert LoraSection(r=8, lora_alpha=3).lora_alpha == 3
    short = TrainingSection(max_seq_length=100)
    assert (short.max_prompt_length, short.max_completion_length) == (50, 50)
    assert (TrainingSection().max_prompt_length, TrainingSection().max_completion_length) == (256, 256)


def test_a_lora_section_switches_adapters_on() -> None:
    assert not RunConfig(models=ONE).lora.enabled
    assert RunConfig(models=ONE, lora=LoraSection(r=4)).lora.enabled
    assert RunConfig.model_validate({"models": ONE, "lora": {"r": 4}}).lora.enabled
    assert not RunConfig(models=ONE, lora=LoraSection(enabled=False)).lora.enabled


def test_models_need_different_names() -> None:
    same = (ModelSection(huggingface_id="a/m"), ModelSection(huggingface_id="b/m"))
    assert "both named 'm'" in refused(RunConfig, models=same)
    RunConfig(models=(same[0], ModelSection(huggingface_id="b/m", name="m2")))


def test_all_problems_of_a_section_are_told() -> None:
    message = refused(TrainingSection, bf16=True, fp16=True, warmup_steps=1, warmup_ratio=0.5, output_dir="/")
    assert "bf16 and fp16" in message
    assert "warmup_ratio" in message
    assert "output_dir" in message


# ---- settings that nobody reads


def block(method: str, **settings: Any) -> RunConfig:
    return RunConfig.model_validate({"models": ONE, "post_training": {"method": method, **settings}})


def test_settings_of_another_method_are_refused_unless_they_say_nothing() -> None:
    with pytest.raises(ValidationError, match="method sft does not read it"):
        block("sft", beta=0.3)
    with pytest.raises(ValidationError, match="loss_reduction"):
        block("dpo", loss_reduction="sequences")
    for method in METHODS:
        nulls = {key.name: None for key in KEYS if key.section == "post_training" and key.name != "method"}
        assert block(method, **nulls).post_training == METHODS[method]()
        assert block(method, **NEUTRAL).post_training == METHODS[method]()


def test_neutral_means_the_same_value_of_the_same_type() -> None:
    with pytest.raises(ValidationError):
        block("sft", label_smoothing=False)
    with pytest.raises(ValidationError):
        block("sft", use_ref_model=1)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "kto_pair"])
def test_settings_that_the_loss_does_not_read_are_refused(loss_type: str) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        DpoSettings(loss_type=loss_type, label_smoothing=0.1)  # type: ignore[arg-type]
    DpoSettings(loss_type=loss_type, label_smoothing=0.0)  # type: ignore[arg-type]


def test_ipo_norm_is_read_by_ipo_only() -> None:
    with pytest.raises(ConfigError, match="ipo_norm"):
        DpoSettings(ipo_norm="sum")
    assert DpoSettings(loss_type="ipo", ipo_norm="sum").ipo_norm == "sum"


def test_one_reference() -> None:
    with pytest.raises(ConfigError, match="ref_model_id"):
        DpoSettings(use_ref_model=False, ref_model_id="org/ref")


# ---- the configuration as an object


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lora.enabled": True}, "mixes whole models, and lora.enabled: true trains adapters"),
        ({"models.0.adapter": "x"}, "mixes whole models, and models.0.adapter trains adapters"),
        ({"post_training.ref_model_id": "org/other"}, "names another model, which cannot be mixed"),
        ({"post_training.ref_sync_steps": 0}, "ref_sync_steps is 0"),
        ({"post_training.ref_sync_steps": None, "post_training.ref_mixup_alpha": 0.5}, "does not read it"),
    ],
    ids=str,
)
def test_a_reference_that_follows_the_policy(overrides: dict[str, Any], said: str) -> None:
    base = {"models": [{"huggingface_id": "org/model"}], "post_training.method": "dpo"}
    synced = {**base, "post_training.ref_sync_steps": 10}
    assert load_config(overrides={**synced, "post_training.ref_mixup_alpha": 0.5}).post_training.ref_mixup_alpha == 0.5
    with pytest.raises(ConfigError, match=said):
        load_config(overrides={**synced, **overrides})


def test_frozen_equal_hashable_copied_and_pickled() -> None:
    config = RunConfig(models=ONE, post_training=DpoSettings(beta=0.3)).with_origins({"seed": "somewhere"})
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]
    twin = RunConfig(models=ONE, post_training=DpoSettings(beta=0.3))
    assert config == twin
    assert hash(config) == hash(twin)
    assert config != RunConfig(models=ONE)
    assert config != "a text"
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.model_copy(update={"seed": 7})):
        assert copied.origins["seed"] == "somewhere"


def test_origins_of_a_configuration_made_in_python() -> None:
    config = RunConfig(models=ONE, training=TrainingSection(bf16=True), post_training=SftSettings())
    assert config.origins["training.bf16"] == "python"
    assert config.origins["models.0.huggingface_id"] == "python"
    assert config.origins["training.fp16"] == "default"
    assert config.origins["lora.enabled"] == "default"
    assert list(config.origins) == [key for key, _, _ in config.leaves()]


def test_bytes_that_the_locale_cannot_read_are_said_so() -> None:
    undecoded = "runs/größe".encode().decode("ascii", "surrogateescape")  # as Python takes an argument in such a locale
    said = refused(TrainingSection, output_dir=undecoded)
    assert "its locale knows no UTF-8" in said and "PYTHONUTF8=1" in said


def in_ascii(code: str, folder: Path | None = None) -> str:
    """What a process prints whose locale knows no UTF-8. folder: where it runs."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere paths are UTF-8 whatever the locale is")
def test_a_file_is_read_as_utf8_and_its_paths_are_refused_where_the_locale_has_no_such_letters(tmp_path: Path) -> None:
    """Every key that can be a path, with file and line; texts that are no paths hold what they like."""
    homes = {"huggingface_id": "models", "adapter": "models", "ref_model_id": "post_training"}
    homes |= {"resume_from_checkpoint": "finetuning", "logging_dir": "logging"}
    homes |= dict.fromkeys(("output_dir", "mount_dir"), "training")
    lines = []
    for key in sorted(PATHS - {"huggingface_id", "adapter"}):
        lines += [
            f"{homes.get(key, 'dataset')}:",
            f"  {key}: größe",
            *["  method: dpo"][: key == "ref_model_id"],
            "---",
        ]
    lines += ["models:", "  - huggingface_id: größe", "    adapter: größe"]
    told = in_ascii(
        f"""
from strop.config import load_config
from strop.errors import ConfigError
for text in {chr(10).join(lines)!a}.split("\\n---\\n"):
    with open("c.yaml", "wb") as file:
        file.write((text + "\\n").encode())
    try:
        load_config("c.yaml")
    except ConfigError as error:
        print(str(error).encode("ascii", "backslashreplace").decode())
config = load_config(overrides={{"models.0.huggingface_id": "m", "dataset.prompt_column": "gr\\xf6\\xdfe"}})
print(ascii(config.dataset.prompt_column))
""",
        tmp_path,
    )
    for key in PATHS:
        assert re.search(rf"c\.yaml:\d: \S*{key} is 'gr\\xf6\\xdfe', which cannot be a path in this process", told), key
    assert told.count("PYTHONUTF8=1") >= len(PATHS) and told.endswith("'gr\\xf6\\xdfe'\n")
