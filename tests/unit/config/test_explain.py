"""What a user reads: the place, the key, the value found, the values expected, and what to do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from strop.config import (
    METHODS,
    DatasetSection,
    GpuSection,
    LoraSection,
    ModelSection,
    RunConfig,
    TrainingSection,
    load_config,
)
from strop.config.layers import Stack
from strop.errors import ConfigError

MODEL = "models:\n  - huggingface_id: org/model\n"


def message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, **arguments: object) -> str:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml", **arguments)  # type: ignore[arg-type]
    return str(caught.value)


CASES = {
    # text after the model, what the message says, line by line
    "text for a number": (
        "training:\n  learning_rate: '5e-7'\n",
        "c.yaml:4: training.learning_rate is '5e-7' (text)\n  expected: a number above 0, or null\n"
        "  to do:    write 5e-07, without quotes, leading zeros or underscores",
    ),
    "leading zero": (
        "training:\n  num_epochs: 012\n",
        "c.yaml:4: training.num_epochs is '012' (text)\n  expected: a whole number of at least 1\n"
        "  to do:    write 12, without quotes, leading zeros or underscores",
    ),
    "yes": (
        "training:\n  bf16: yes\n",
        "c.yaml:4: training.bf16 is 'yes' (text)\n  expected: true or false, or null\n  to do:    write true",
    ),
    "off": (
        "training:\n  auto_precision: off\n",
        "c.yaml:4: training.auto_precision is 'off' (text)\n  expected: true or false\n  to do:    write false",
    ),
    "a boolean for a number": (
        "training:\n  num_epochs: true\n",
        "c.yaml:4: training.num_epochs is true\n  expected: a whole number of at least 1",
    ),
    "a fraction for a whole number": (
        "training:\n  num_epochs: 2.0\n",
        "c.yaml:4: training.num_epochs is 2.0\n  expected: a whole number of at least 1\n  to do:    write 2",
    ),
    "negative": (
        "training:\n  num_epochs: -1\n",
        "c.yaml:4: training.num_epochs is -1\n  expected: a whole number of at least 1",
    ),
    "nan": (
        "training:\n  learning_rate: .nan\n",
        "c.yaml:4: training.learning_rate is nan\n  expected: a finite number above 0, or null",
    ),
    "too large for a float": (
        "training:\n  weight_decay: 1e400\n",
        "c.yaml:4: training.weight_decay is inf\n  expected: a finite number of at least 0",
    ),
    "out of range": (
        "dataset:\n  validation_split: 1.0\n",
        "c.yaml:4: dataset.validation_split is 1.0\n  expected: a number of at least 0 and below 1",
    ),
    "an unknown choice": (
        "training:\n  lr_scheduler: Cosin\n",
        "c.yaml:4: training.lr_scheduler is 'Cosin' (text)\n  expected: one of linear, cosine, constant\n"
        "  to do:    did you mean cosine?",
    ),
    "a number for text": (
        "dataset:\n  name: 3\n",
        "c.yaml:4: dataset.name is 3\n  expected: text, or null\n  to do:    write it in quotes",
    ),
    "one for a list": (
        "gpu:\n  device_ids: 0\n",
        "c.yaml:4: gpu.device_ids is 0\n  expected: a list of whole numbers of at least 0, or null\n"
        "  to do:    write a list: [0]",
    ),
    "an element of a list": (
        "logging:\n  report_to: [tensorboard, neptunes]\n",
        "c.yaml:4: logging.report_to is the list ['tensorboard', 'neptunes']\n  expected: a list of these: "
        "tensorboard, wandb, mlflow, trackio\n  to do:    remove neptunes",
    ),
    "a union": (
        "training:\n  gradient_checkpointing: maybe\n",
        "c.yaml:4: training.gradient_checkpointing is 'maybe' (text)\n"
        "  expected: true, false, auto, or a number above 0 and below 1",
    ),
    "a misspelt key": (
        "training:\n  learning_rat: 1.0\n",
        "c.yaml:4: unknown key training.learning_rat\n  to do:    did you mean training.learning_rate?",
    ),
    "a key of another section": (
        "training:\n  beta: 0.2\n",
        "c.yaml:4: unknown key training.beta\n  to do:    beta belongs in post_training: post_training.beta",
    ),
    "a key of another tool": (
        "training:\n  lr: 0.2\n",
        "c.yaml:4: unknown key training.lr\n  to do:    did you mean training.learning_rate?",
    ),
    "a misspelt key of a reward": (
        "rewards:\n  - exact_match\n  - {name: length, wieght: 2.0}\n",
        "c.yaml:5: unknown key rewards.1.wieght\n  to do:    did you mean rewards.1.weight?",
    ),
    "an unknown key of a source": (
        "dataset:\n  sources:\n    - name: a\n      xyz: 2.0\n",
        "c.yaml:6: unknown key dataset.sources.0.xyz\n"
        "  to do:    the keys of an entry of dataset.sources: name, subset, split, num_samples, fraction, weight, "
        "streaming",
    ),
    "a value of a reward": (
        "rewards:\n  - name: length\n    weight: '2'\n",
        "c.yaml:5: rewards.0.weight is '2' (text)\n  expected: a number from -1e+30 to 1e+30\n"
        "  to do:    write 2, without quotes, leading zeros or underscores",
    ),
    "an infinite weight": (
        "rewards:\n  - name: length\n    weight: .inf\n",
        "c.yaml:5: rewards.0.weight is inf\n  expected: a finite number from -1e+30 to 1e+30",
    ),
    "a list for settings": (
        "rewards:\n  - name: length\n    settings: [1]\n",
        "c.yaml:5: rewards.0.settings is the list [1]\n  expected: names and values",
    ),
    "a reward without a name": (
        "rewards:\n  - weight: 1.0\n",
        "c.yaml:4: rewards.0.name is missing\n  expected: text",
    ),
    "a number for a reward": (
        "rewards: [3]\n",
        "c.yaml:3: rewards.0 is 3\n  expected: a list of names, or of objects with name, weight and settings",
    ),
    "a value of a source": (
        "dataset:\n  sources:\n    - name: a\n      fraction: 2\n",
        "c.yaml:6: dataset.sources.0.fraction is 2\n  expected: a number above 0 and of at most 1",
    ),
    "a key at the top": (
        "learning_rate: 0.2\n",
        "c.yaml:3: unknown key learning_rate\n  to do:    learning_rate belongs in training: training.learning_rate",
    ),
    "a misspelt section": (
        "trainin:\n  bf16: true\n",
        "c.yaml:3: unknown key trainin\n  to do:    did you mean training?",
    ),
    "a value for a section": (
        "training: 5\n",
        "c.yaml:3: training is 5\n  expected: a section with keys (output_dir, num_epochs, max_steps, ...)",
    ),
    "an unknown method": (
        "post_training:\n  method: dpoo\n",
        "c.yaml:4: post_training.method is 'dpoo' (text)\n"
        "  expected: one of sft, dpo, ipo, kto, orpo, simpo, cpo, grpo, reward, distill\n"
        "  to do:    did you mean dpo?",
    ),
    "a method that is none": (
        "post_training:\n  method: [dpo]\n",
        "c.yaml:4: post_training.method is the list ['dpo']\n"
        "  expected: one of sft, dpo, ipo, kto, orpo, simpo, cpo, grpo, reward, distill",
    ),
    "a setting in the union": (
        "post_training:\n  method: dpo\n  beta: -1\n",
        "c.yaml:5: post_training.beta is -1\n  expected: a number above 0",
    ),
    "a misspelt setting": (
        "post_training:\n  method: dpo\n  betta: 1.0\n",
        "c.yaml:5: unknown key post_training.betta\n  to do:    did you mean post_training.beta?",
    ),
    "a setting of another method": (
        "post_training:\n  beta: 0.1\n",
        "c.yaml:4: post_training.beta is 0.1, but method sft does not read it\n"
        "  expected: the settings of sft: loss_reduction\n"
        "  to do:    remove beta, or set method: dpo, ipo, kto, orpo, cpo, grpo or distill",
    ),
    "a setting of another loss": (
        "post_training:\n  method: dpo\n  loss_type: hinge\n  label_smoothing: 0.1\n",
        "c.yaml:6: post_training.label_smoothing is 0.1, but loss_type hinge does not read it\n"
        "  expected: the settings of dpo with loss_type hinge: beta, use_ref_model, ref_model_id, loss_type, "
        "f_divergence, ld_alpha, wpo_weighting, ref_sync_steps, sft_weight, online\n"
        "  to do:    remove label_smoothing, or choose loss_type sigmoid, robust, exo_pair, aot or aot_unpaired",
    ),
    "two keys together": (
        "training:\n  max_seq_length: 100\n  max_prompt_length: 200\n",
        "c.yaml:5 and c.yaml:4: training.max_prompt_length 200 leaves no token for a completion within max_seq_length "
        "100\n  to do:    lower max_prompt_length or raise max_seq_length",
    ),
    "a huge number": (
        "seed: " + "9" * 90 + "\n",
        "c.yaml:3: seed is a number of more than 60 digits\n"
        "  expected: a whole number of at least 0 and below 4294967296",
    ),
    "a folder of the system": (
        "training:\n  output_dir: /\n",
        "c.yaml:4: training.output_dir is '/', which names no folder of its own\n"
        "  expected: a folder of your own, such as ./outputs",
    ),
    "variables": (
        "dataset:\n  train_file: ${DATA}/x.jsonl\n",
        "c.yaml:4: dataset.train_file holds ${...}; variables are not replaced here\n  to do:    write the value",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    text, expected = CASES[case]
    assert message(tmp_path, monkeypatch, MODEL + text) == expected


@pytest.mark.parametrize(
    ("text", "where"),
    [("seed: 1\n", ""), ("models:\n", ""), ("models: []\n", "c.yaml:1: ")],
)
def test_missing_models_say_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, where: str
) -> None:
    found = message(tmp_path, monkeypatch, text)
    assert found.startswith(where)
    assert "- huggingface_id: org/model" in found
    assert "--model org/model" in found


def test_a_model_without_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "models.0.huggingface_id is missing\n  expected: a hub id or a folder"
    assert message(tmp_path, monkeypatch, "models:\n  - name: x\n") == f"c.yaml:2: {found}"
    assert message(tmp_path, monkeypatch, "seed: 1\n", overrides={"models.0.name": "x"}).endswith(f"]: {found}")


@pytest.mark.parametrize(
    "text", ["models: org/model\n", "models: {huggingface_id: a}\n", "models: [a]\n", "models: [[1]]\n"]
)
def test_models_that_are_no_list_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert message(tmp_path, monkeypatch, text).startswith("c.yaml:1: models")


def test_all_problems_are_listed_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MODEL + (
        "dataset:\n  nam: x\ntraining:\n  num_epochs: 0\n  gradient_checkpointing: often\n  target_modules: [1]\n"
        "post_training:\n  method: dpo\n  beta: 0\n"
    )
    found = message(tmp_path, monkeypatch, text).splitlines()
    assert found[0] == "5 problems in the configuration"
    assert [line.split()[1] for line in found if line.startswith("- ")] == [
        "c.yaml:4:",
        "c.yaml:11:",
        "c.yaml:6:",
        "c.yaml:7:",
        "c.yaml:8:",
    ]


def test_a_thousand_problems_are_counted_in_good_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.process_time()
    found = message(tmp_path, monkeypatch, MODEL + "".join(f"key{i}: 1\n" for i in range(5000)))
    assert found.count("unknown key") == 20
    assert "4980 more" in found
    assert time.process_time() - start < 10


def test_secrets_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a1B2" * 9
    for text in (
        f"seed: {token}\n",
        f"dataset:\n  name: {token}\n",
        f"gpu:\n  device_ids: [{token}]\n",
        f"{token}: 1\n",
    ):
        assert token not in message(tmp_path, monkeypatch, MODEL + text)


def test_messages_show_no_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = message(tmp_path, monkeypatch, MODEL + '"\\e[31m\\u202e": 1\nseed: "\\e[31m"\n')
    assert "\x1b" not in found
    assert "\u202e" not in found


# ---- what is made in Python


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("training", {"learning_rat": 1e-5}),
        ("training", {"learning_rate": "1e-5", "warmup_steps": 1, "warmup_ratio": 0.1}),
        ("training", {"bf16": "yes", "num_epochs": 1.0}),
        ("dataset", {"validation_split": 2.0}),
        ("lora", {"r": 0}),
        ("gpu", {"device_ids": [0, 0]}),
        ("post_training", {"method": "dpo", "los_type": "ipo"}),
        ("post_training", {"method": "dpo", "ipo_norm": "sum"}),
        ("post_training", {"method": "sft", "beta": 0.1}),
    ],
)
def test_python_has_the_hints_of_the_command_line(section: str, values: dict[str, Any]) -> None:
    models = [{"huggingface_id": "org/model"}]
    kinds: dict[str, Any] = {
        "training": TrainingSection,
        "dataset": DatasetSection,
        "lora": LoraSection,
        "gpu": GpuSection,
        "post_training": METHODS[values.get("method", "sft")],
    }
    with pytest.raises(ConfigError) as file:
        Stack({"models": models, section: values}).build()
    with pytest.raises(ConfigError) as whole:
        RunConfig(models=models, **{section: values})
    with pytest.raises(ConfigError) as alone:
        kinds[section](**values)
    assert str(whole.value) == str(file.value)
    assert [line.split(": ")[-1] for line in str(alone.value).splitlines()] == [
        line.split(": ")[-1] for line in str(file.value).splitlines()
    ]
    assert section in str(alone.value)


def test_a_model_and_a_preset_in_python() -> None:
    with pytest.raises(ConfigError, match="huggingface_id is missing"):
        ModelSection()
    with pytest.raises(ConfigError, match="load_config"):
        RunConfig(models=[{"huggingface_id": "m"}], preset="cpu")
