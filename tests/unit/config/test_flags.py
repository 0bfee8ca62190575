"""Any key as a flag: spellings, values, and what is refused."""

from __future__ import annotations

import pytest

from strop.config import RunConfig, load_config
from strop.config.flags import split_flags
from strop.config.layers import _override_layer
from strop.config.schema import KEYS, Key
from strop.errors import ConfigError

OWN = ("--config", "--resume", "--dry-run", "--preset")


def load(line: str) -> RunConfig:
    overrides, rest = split_flags(["--model", "org/model", *line.split()], OWN)
    assert rest == []
    return load_config(overrides=overrides)


@pytest.mark.parametrize(
    "line",
    [
        "--training.learning_rate 1e-6",
        "--training.learning_rate=1e-6",
        "--training.learning-rate 1e-6",
        "--learning-rate 1e-6",
        "--learning_rate 1e-6",
        "--learning-rate=1e-6",
    ],
)
def test_spellings_of_a_key(line: str) -> None:
    config = load(line)
    assert config.training.learning_rate == 1e-6
    assert config.origins["training.learning_rate"] == "command line"


@pytest.mark.parametrize(
    ("line", "value"),
    [("--bf16", True), ("--bf16 true", True), ("--bf16=false", False), ("--no-bf16", False), ("--bf16 null", None)],
)
def test_switches(line: str, value: bool | None) -> None:
    assert load(line).training.bf16 is value
    assert load(line + " --num-epochs 2").training.num_epochs == 2


def test_aliases() -> None:
    config = load("--epochs 3 --dpo-train-file a.jsonl --dpo-val-file b.jsonl --method dpo")
    assert config.models[0].huggingface_id == "org/model"
    assert config.training.num_epochs == 3
    assert (config.dataset.train_file, config.dataset.val_file) == ("a.jsonl", "b.jsonl")
    config = load("--train-file a.jsonl --val-file b.jsonl --splits-dir s --output-dir o --auto-precision")
    assert (config.dataset.train_file, config.dataset.splits_dir) == ("a.jsonl", "s")
    assert (config.training.output_dir, config.training.auto_precision) == ("o", True)
    assert load("--no-load-best-model-at-end").finetuning.load_best_model_at_end is False


def test_values_follow_the_type_of_the_key() -> None:
    config = load("--revision 12 --dataset.name null --prompt-column null --output-dir 5 --save-total-limit null")
    assert config.models[0].revision == "12"
    assert config.dataset.name is None
    assert config.dataset.prompt_column == "null"
    assert config.training.output_dir == "5"
    assert config.training.save_total_limit is None
    assert load("--gradient-checkpointing 0.5").training.gradient_checkpointing == 0.5
    assert load("--gradient-checkpointing").training.gradient_checkpointing is True


TEXTS = {bool: ("true", True), int: ("7", 7), float: ("0.25", 0.25), type(None): ("null", None)}
"""A text for each kind of value beside text, and what it means."""


@pytest.mark.parametrize(
    "key", [key for key in KEYS if str in key.kinds and key.kinds & TEXTS.keys()], ids=lambda key: key.dotted
)
def test_keys_that_take_text_and_more_take_both_as_flags_as_in_a_file(key: Key) -> None:
    for kind, (text, value) in TEXTS.items():
        overrides, _ = split_flags([f"--{key.dotted.replace('.N.', '.0.')}={text}"], OWN)
        (found,) = _override_layer(overrides).values.values()
        assert found == (value if kind in key.kinds else text), kind


@pytest.mark.parametrize("line", ["--init-lora-weights true", "--init-lora-weights", "--init-lora-weights=true"])
def test_a_switch_that_takes_text_too(line: str) -> None:
    assert load(line).lora.init_lora_weights is True
    assert load("--init-lora-weights pissa").lora.init_lora_weights == "pissa"


@pytest.mark.parametrize(
    ("line", "modules"),
    [
        ("--target-modules auto", "auto"),
        ("--target-modules q_proj,v_proj", ("q_proj", "v_proj")),
        ("--target-modules [q_proj]", ("q_proj",)),
        ("--lora.target_modules=all-linear", "all-linear"),
    ],
)
def test_lists(line: str, modules: object) -> None:
    config = load(line + " --device-ids 0,1 --report-to tensorboard --modules-to-save null")
    assert config.lora.target_modules == modules
    assert config.lora.enabled
    assert config.gpu.device_ids == (0, 1)
    assert config.logging.report_to == ("tensorboard",)
    assert config.lora.modules_to_save is None


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.dotted)
def test_every_key_is_a_flag(key: object) -> None:
    name = key.dotted.replace(".N.", ".0.")  # type: ignore[attr-defined]
    overrides, _ = split_flags([f"--{name}=x", f"--config={name}"], OWN)
    assert overrides == {name: "x"}


def test_own_flags_and_their_values_come_back() -> None:
    line = ["--config", "f", "--bf16", "--resume", "--learning-rate", "-1", "--resume=x", "--dry-run"]
    overrides, rest = split_flags(line, OWN)
    assert overrides == {"bf16": "true", "learning_rate": "-1"}
    assert overrides.flags == {"bf16": "--bf16", "learning_rate": "--learning-rate"}
    assert rest == ["--config", "f", "--resume", "--resume=x", "--dry-run"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("--learnin-rate 1", "did you mean --learning-rate?"),
        ("--training.learnin_rate 1", "did you mean --training.learning_rate?"),
        ("--training.beta 1", "beta belongs in post_training; write --post_training.beta"),
        ("--lr 1", "did you mean --training.learning_rate?"),
        ("--per_device_batch_size 1", "did you mean --training.per_device_train_batch_size?"),
        ("--output x", "did you mean --output-dir?"),
        ("--confg 1", "did you mean --config?"),
        ("--name x", "--models.0.name or --dataset.name"),
        ("--no-learning-rate", "unknown flag --no-learning-rate"),
        ("--no-bf16 true", "takes no value"),
        ("--no-bf16=true", "takes no value"),
        ("--learning-rate", "needs a value"),
        ("--learning-rate --bf16", "needs a value"),
        ("--bf16 --no-bf16", "training.bf16 is given twice"),
        ("--bf16 --bf16", "--bf16 and --bf16: training.bf16 is given twice"),
        ("--learning-rate 1 --training.learning_rate 2", "given twice"),
        ("--model x", "models.0.huggingface_id is given twice"),
        ("--models.0.huggingface_id x", "given twice"),
        ("--training x", "is a section"),
        ("--models x", "is a section"),
        ("-lr 1", "belongs to no flag"),
        ("--bf16 true false", "belongs to no flag"),
        ("-- x", "belongs to no flag"),
        ("--preset.x y", "unknown flag"),
        ("--", "belongs to no flag"),
        ("--=", "unknown flag"),
        ("--learning-rate abc", "--learning-rate: training.learning_rate is 'abc'"),
        ("--num-epochs -1", "--num-epochs: training.num_epochs is -1"),
        ("--output-dir=", "output_dir is empty"),
        ("--learning-rate=", "--learning-rate: training.learning_rate is empty"),
        ("--max-steps=", "--max-steps: training.max_steps is empty"),
        ("--bf16=", "--bf16: training.bf16 is empty"),
        ("--optim=", "--optim: training.optim is empty"),
        ("--device-ids [0", "--device-ids: not valid YAML"),
        ("--device-ids [*a]", "--device-ids: an anchor"),
        ("--models.2.name x", "--models.2.name: there is no model 2"),
        ("--bf16 --fp16", "--bf16 and --fp16: training.bf16 and fp16 are both true"),
    ],
)
def test_refused(line: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(line)
    assert word in str(caught.value)
