"""Defaults < preset < file < overrides: what wins, what is switched off, and where each value came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.config import DpoSettings, LoraSection, ModelSection, RunConfig, TrainingSection, load_config
from strop.errors import ConfigError

Write = Callable[..., Path]
MODEL = "models:\n  - huggingface_id: org/model\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write(text, name): a file in an empty folder that is also the current one."""
    monkeypatch.chdir(tmp_path)

    def file(text: str, name: str = "config.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return file


def test_each_layer_wins_over_the_one_before(write: Write) -> None:
    write("training:\n  num_epochs: 2\n  save_steps: 2\n  eval_steps: 2\n", "p.yaml")
    path = write(MODEL + "training:\n  save_steps: 3\n  eval_steps: 3\n")
    config = load_config(path, preset="p.yaml", overrides={"training.eval_steps": 4})
    training = config.training
    assert (training.logging_steps, training.num_epochs, training.save_steps, training.eval_steps) == (10, 2, 3, 4)
    assert config.origins["training.logging_steps"] == "default"
    assert config.origins["training.num_epochs"] == "preset p.yaml"
    assert config.origins["training.save_steps"] == "config.yaml:4"
    assert config.origins["training.eval_steps"] == "python"


def test_lists_are_replaced_as_a_whole(write: Write) -> None:
    write("lora:\n  target_modules: [a, b, c]\n", "p.yaml")
    path = write(MODEL + "lora:\n  target_modules: [d]\n")
    assert load_config(path, preset="p.yaml").lora.target_modules == ("d",)


def test_everything_has_an_origin(write: Write) -> None:
    config = load_config(write(MODEL))
    assert list(config.origins) == [key for key, _, _ in config.leaves()]
    assert config.origins["models.0.huggingface_id"] == "config.yaml:2"
    assert config.origins["models.0.name"].startswith("default: ")
    assert config.origins["training.learning_rate"].startswith("default: by method")
    assert config.model_copy(update={"seed": 1}).origins == config.origins


def test_null_in_a_later_layer_brings_the_default_back(write: Write) -> None:
    path = write(MODEL + "training:\n  gradient_accumulation_steps: null\n  save_total_limit: null\n")
    config = load_config(path, preset="cpu")
    assert config.training.gradient_accumulation_steps == 8
    assert config.origins["training.gradient_accumulation_steps"] == "default"
    assert config.training.save_total_limit is None  # a value of its own
    assert config.origins["training.save_total_limit"] == "config.yaml:5"


def test_an_empty_section_changes_nothing_but_an_empty_lora_section_is_refused(write: Write) -> None:
    assert load_config(write(MODEL + "training:\n"), preset="cpu").training.gradient_accumulation_steps == 1
    for text in ("lora:\n", "lora: {}\n"):
        with pytest.raises(ConfigError, match="lora section is empty") as caught:
            load_config(write(MODEL + text))
        assert caught.value.where == "config.yaml:3"
    with pytest.raises(ConfigError, match="lora section is empty"):
        load_config(write(MODEL), overrides={"lora": {}})


# ---- presets


def test_a_configuration_names_its_preset_and_the_argument_wins(write: Write) -> None:
    path = write("preset: memory-efficient\n" + MODEL)
    assert load_config(path).training.per_device_train_batch_size == 1
    assert load_config(path, preset="cpu").training.per_device_train_batch_size == 2
    assert load_config(path, overrides={"preset": "cpu"}).training.gradient_accumulation_steps == 1


def test_presets_of_the_project_come_first(write: Write) -> None:
    write("training:\n  num_epochs: 7\n", "configs/presets/cpu.yaml")
    write("training:\n  num_epochs: 8\n", "configs/presets/team.yaml")
    path = write(MODEL)
    assert load_config(path, preset="cpu").training.num_epochs == 7
    assert load_config(path, preset="team").training.num_epochs == 8
    assert load_config(path, preset="gpu-bf16").training.bf16 is True
    assert load_config(path, preset="configs/presets/team.yaml").origins["training.num_epochs"].startswith("preset ")


@pytest.mark.parametrize(
    ("preset", "word"),
    [
        ("cp", "did you mean cpu"),
        ("gpu", "did you mean gpu-bf16"),
        ("none", "memory-efficient"),
        ("./none.yaml", "cannot be read"),
        ("", "no preset"),
    ],
)
def test_unknown_presets(write: Write, preset: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_config(write(MODEL), preset=preset)


def test_presets_that_are_none(write: Write) -> None:
    path = write(MODEL)
    write("preset: cpu\n", "p.yaml")
    with pytest.raises(ConfigError, match="names a preset"):
        load_config(path, preset="p.yaml")
    write("training:\n  num_epoch: 1\n", "p.yaml")
    with pytest.raises(ConfigError, match="num_epochs") as caught:
        load_config(path, preset="p.yaml")
    assert caught.value.where == "preset p.yaml:2"
    with pytest.raises(ConfigError, match="preset is 3"):
        load_config(write("preset: 3\n" + MODEL))
    with pytest.raises(ConfigError, match="preset is"):
        load_config(path, overrides={"preset": 3})


# ---- keys that exclude each other


@pytest.mark.parametrize(("on", "off"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_later_precision_switches_the_earlier_one_off(write: Write, on: str, off: str) -> None:
    path = write(MODEL + f"training:\n  {off}: true\n")
    config = load_config(path, overrides={on: True})
    assert getattr(config.training, on) is True
    assert getattr(config.training, off) is False
    assert config.origins[f"training.{off}"] == f"switched off by {on} (python)"
    file = load_config(path, preset=f"gpu-{on}")  # the file is later than the preset
    assert getattr(file.training, on) is False
    assert getattr(file.training, off) is True


def test_an_unset_precision_stays_unset(write: Write) -> None:
    config = load_config(write(MODEL), overrides={"bf16": True})
    assert config.training.fp16 is None
    config = load_config(write(MODEL + "training:\n  fp16: true\n"), overrides={"bf16": False})
    assert (config.training.bf16, config.training.fp16) == (False, True)


def test_both_precisions_in_one_layer_are_refused_with_both_places(write: Write) -> None:
    with pytest.raises(ConfigError, match="both true") as caught:
        load_config(write(MODEL + "training:\n  bf16: true\n  fp16: true\n"))
    assert caught.value.where == "config.yaml:4 and config.yaml:5"
    with pytest.raises(ConfigError, match="both true"):
        load_config(write(MODEL), overrides={"bf16": True, "fp16": True})


def test_a_later_warm_up_replaces_the_earlier_one(write: Write) -> None:
    path = write(MODEL + "training:\n  warmup_steps: 0\n")
    training = load_config(path, overrides={"warmup_ratio": 0.1}).training
    assert (training.warmup_steps, training.warmup_ratio) == (None, 0.1)
    path = write(MODEL + "training:\n  warmup_ratio: 0.1\n")
    training = load_config(path, overrides={"warmup_steps": 0}).training
    assert (training.warmup_steps, training.warmup_ratio) == (0, None)


# ---- overrides


def test_bare_dotted_and_nested_names_say_the_same(write: Write) -> None:
    path = write(MODEL + "post_training: {method: dpo}\n")
    wanted = load_config(path, overrides={"training.learning_rate": 1e-6, "post_training.beta": 0.2})
    assert wanted.training.learning_rate == 1e-6
    for overrides in (
        {"learning_rate": 1e-6, "beta": 0.2},
        {"learning_rate": "1e-6", "beta": "0.2"},
        {"training": {"learning_rate": 1e-6}, "post_training": {"beta": 0.2}},
        {"training": TrainingSection(learning_rate=1e-6), "post_training": DpoSettings(beta=0.2)},
    ):
        assert load_config(path, overrides=overrides) == wanted


def test_python_alone() -> None:
    config = load_config(
        overrides={
            "models": [ModelSection(huggingface_id="org/a"), {"huggingface_id": "org/b"}],
            "lora": LoraSection(),
            "post_training": DpoSettings(),
            "output_dir": Path("runs"),
            "report_to": ["tensorboard"],
            "device_ids": (0, 1),
            "seed": 3,
        }
    )
    assert [model.name for model in config.models] == ["a", "b"]
    assert config.lora.enabled
    assert config.post_training.method == "dpo"
    assert config.training.output_dir == "runs"
    assert config.gpu.device_ids == (0, 1)
    assert config.seed == 3


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"name": "x"}, "several sections"),
        ({"learning_rat": 1.0}, "did you mean training.learning_rate"),
        ({"training.beta": 1.0}, "beta belongs in post_training"),
        ({"lr": 1.0}, "training.learning_rate"),
        ({"": 1}, "no key"),
        ({"a.b.c": 1}, "no key"),
        ({3: 1}, "a key of the overrides is 3"),
        ({"training": 3}, "training is 3"),
        ({"bf16": True, "training.bf16": True}, "given twice"),
        ({"training": {"bf16": True}, "bf16": True}, "given twice"),
        ({"huggingface_id": "a", "models.0.huggingface_id": "b"}, "given twice"),
        ({"num_epochs": object()}, "training.num_epochs is <object"),
        ({"num_epochs": {"a": 1}}, "training.num_epochs is a mapping"),
        ({"seed": 10**500}, "seed is a number of more than 60 digits"),
    ],
)
def test_overrides_that_are_refused(write: Write, overrides: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_config(write(MODEL), overrides=overrides)
    with pytest.raises(ConfigError):
        load_config(write(MODEL), overrides=[overrides])  # type: ignore[arg-type]


TWO = "models:\n  - huggingface_id: org/a\n  - huggingface_id: org/b\n"


def test_keys_of_models(write: Write) -> None:
    path = write(TWO)
    config = load_config(path, overrides={"models.1.huggingface_id": "org/c", "models.0.name": "first"})
    assert [model.name for model in config.models] == ["first", "c"]
    assert config.origins["models.1.huggingface_id"] == "python"
    assert config.origins["models.0.huggingface_id"] == "config.yaml:2"
    with pytest.raises(ConfigError, match="any of the 2 models"):
        load_config(path, overrides={"huggingface_id": "org/c"})
    with pytest.raises(ConfigError, match="no model 2"):
        load_config(path, overrides={"models.2.huggingface_id": "org/c"})
    assert load_config(write(MODEL), overrides={"huggingface_id": "org/c"}).models[0].name == "c"


def test_overrides_can_name_the_models_where_no_file_does(write: Write) -> None:
    for text in ("seed: 1\n", "seed: 1\nmodels:\n", "models: []\n"):
        config = load_config(
            write(text), overrides={"models.0.huggingface_id": "a/b", "models.1.huggingface_id": "c/d"}
        )
        assert [model.name for model in config.models] == ["b", "d"]
    assert load_config(overrides={"huggingface_id": "a/b"}).models[0].name == "b"
    with pytest.raises(ConfigError, match="no model 1"):
        load_config(overrides={"models.1.huggingface_id": "a/b"})


def test_a_python_configuration_and_its_yaml_twin_are_equal(write: Write) -> None:
    path = write(
        MODEL
        + "post_training: {method: dpo, beta: 0.2}\nlora: {r: 8}\ntraining: {learning_rate: 1e-6, warmup_steps: 5}\n"
        "finetuning: {greater_is_better: false}\n"
    )
    assert load_config(path) == RunConfig(
        models=(ModelSection(huggingface_id="org/model"),),
        post_training=DpoSettings(beta=0.2),
        lora=LoraSection(r=8),
        training=TrainingSection(learning_rate=1e-6, warmup_steps=5),
        finetuning={"greater_is_better": False},  # type: ignore[arg-type]
    )


def test_the_home_folder_can_be_written_as_a_tilde(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("training: {num_epochs: 7}\n")
    assert load_config(write(MODEL + "preset: ~/own.yaml\n")).training.num_epochs == 7
    assert load_config("~/own.yaml", overrides={"huggingface_id": "a/b"}).training.num_epochs == 7
