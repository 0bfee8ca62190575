"""What is left open is decided once and stays; harmful values are warned of; the resolved YAML loads as its equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.config import (
    METHODS,
    ModelSection,
    RunConfig,
    TrainingSection,
    advice,
    load_config,
    of_model,
    resolve,
    to_yaml,
)
from strop.config.sections import LEARNING_RATES

MODEL = ModelSection(huggingface_id="org/model")


def load(**overrides: Any) -> RunConfig:
    return load_config(overrides={"models": [MODEL], **{k.replace("__", "."): v for k, v in overrides.items()}})


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_follows_the_method_and_what_trains(method: str) -> None:
    full = {"sft": 2e-5, "grpo": 1e-6, "reward": 1e-5, "distill": 1e-5}.get(method, 5e-7)
    assert load(method=method).training.learning_rate == full
    assert load(method=method, lora__r=8).training.learning_rate == pytest.approx(10 * full, rel=1e-15)
    continued = {"huggingface_id": "org/model", "adapter": "org/adapter"}
    assert load(method=method, models=[continued]).training.learning_rate == pytest.approx(10 * full, rel=1e-15)
    for adapted in (True, False):
        given = load(method=method, learning_rate=3e-6, lora__enabled=adapted)
        assert given.training.learning_rate == 3e-6


def test_models_of_both_kinds_get_a_rate_each() -> None:
    models = [{"huggingface_id": "org/a"}, {"huggingface_id": "org/b", "adapter": "org/adapter"}]
    config = load(method="dpo", models=models)
    rates = [of_model(config, model).training.learning_rate for model in config.models]
    assert (config.training.learning_rate, rates) == (None, [5e-7, 5e-6])
    assert of_model(config, config.models[1]).models == config.models[1:]


def test_warm_up_is_a_share_unless_the_file_says_steps() -> None:
    for keys, expected in (
        ({}, (None, 0.1)),
        ({"warmup_steps": 100}, (100, None)),
        ({"warmup_steps": 0}, (0, None)),
        ({"warmup_ratio": 0.03}, (None, 0.03)),
    ):
        training = load(**keys).training
        assert (training.warmup_steps, training.warmup_ratio) == expected


def test_the_completions_of_sft_are_cut_by_the_whole_row_alone() -> None:
    limits = {method: load(method=method, max_seq_length=100).training.max_completion_length for method in METHODS}
    assert limits.pop("sft") is None
    assert set(limits.values()) == {50}
    assert load(method="sft", max_completion_length=50).training.max_completion_length == 50
    assert load(method="dpo", max_completion_length=None).training.max_completion_length is None


def test_nothing_stops_early_unless_it_is_asked_for() -> None:
    assert load().finetuning.early_stopping_patience is None
    assert load().training.eval_at_start


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False),
        ("loss", False),
        ("nll", False),
        ("eval_nll", False),
        ("eval_val_loss", False),
        ("eval_loss/preference", False),
        ("loss/kl", False),
        ("eval_divergence", False),
        ("reverse_kl", False),
        ("eval_rewards/accuracies", True),
        ("rewards/margins", True),
        ("accuracy", True),
        ("eval_rewards/rewards/own.py:right/mean", True),  # as evaluations name a function of the user's own
    ],
)
def test_losses_are_better_when_smaller(metric: str, greater: bool) -> None:
    config = load(metric_for_best_model=metric)
    assert config.finetuning.greater_is_better is greater
    assert load(metric_for_best_model=metric, greater_is_better=not greater).finetuning.greater_is_better is not greater


def test_resolving_is_idempotent_and_the_same_for_python_and_yaml() -> None:
    raw = RunConfig(models=(MODEL,), training=TrainingSection(learning_rate=None, max_steps=5))
    resolved = resolve(raw)
    assert raw.training.learning_rate is None
    assert resolve(resolved) is resolved
    assert resolved == load(max_steps=5)
    assert resolved.origins["training.learning_rate"] == f"default: {LEARNING_RATES}"
    assert resolved.origins["training.max_steps"] == "python"


# ---- warnings


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"method": "grpo", "algorithm": "sapo", "gate": "clip"}, "changes nothing"),
        (
            {"method": "grpo", "algorithm": "dr_grpo", "advantage": "group", "aggregation": "sequence"},
            "dr_grpo changes nothing: what is given wins over it (advantage: group, aggregation: sequence)",
        ),
        ({"method": "dpo", "learning_rate": 2e-5}, "collapse"),
        ({"method": "dpo", "learning_rate": 2e-4, "lora.r": 8}, "collapse"),
        ({"method": "dpo", "learning_rate": 5e-8}, "very little"),
        ({"method": "dpo", "learning_rate": 5e-7, "lora.r": 8}, "very little"),
        ({"method": "dpo", "beta": 0.001}, "beta"),
        ({"method": "dpo", "beta": 3.0}, "beta"),
        ({"method": "dpo", "use_ref_model": False, "lora.enabled": True}, "use_ref_model"),
        ({"auto_precision": True, "bf16": False}, "auto_precision"),
        ({"greater_is_better": True}, "highest eval_loss"),
    ],
)
def test_values_that_are_warned_of(overrides: dict[str, Any], word: str) -> None:
    (line,) = advice(load(**overrides))
    assert word in line


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"learning_rate": 2e-4},
        {"method": "dpo"},
        {"method": "dpo", "lora__r": 8},
        {"method": "dpo", "learning_rate": 1e-5, "beta": 1.0},
        {"method": "dpo", "learning_rate": 1e-4, "lora__r": 8},
        {"method": "dpo", "learning_rate": 1e-6, "lora__r": 8},
        {"method": "dpo", "learning_rate": 1e-7, "beta": 0.01},
        {"method": "grpo", "algorithm": "dr_grpo", "advantage": "group"},
        {"method": "grpo", "algorithm": "gspo", "epsilon": 0.1},
        {"method": "grpo", "advantage": "mean"},
        {"method": "distill", "learning_rate": 2e-5},
        {"method": "reward", "learning_rate": 1e-4},  # as TRL has it
        {"greater_is_better": False},
        {"method": "dpo", "metric_for_best_model": "rewards/accuracies", "greater_is_better": True},
        {"method": "dpo", "use_ref_model": False},
        {"auto_precision": True},
    ],
)
def test_values_that_are_not(overrides: dict[str, Any]) -> None:
    assert advice(load(**overrides)) == []


def test_what_auto_precision_chose_is_not_taken_for_given() -> None:
    chosen = {"training.bf16": True, "training.fp16": False}
    assert advice(load(auto_precision=True).with_values(chosen, "auto_precision: the faster one")) == []


def test_smaller_models_stand_higher_rates() -> None:
    def warned(rate: float, num_weights: int, **lora: Any) -> bool:
        lines = advice(load(method="dpo", learning_rate=rate, **lora), num_weights)
        assert all("collapse" in line for line in lines)
        return bool(lines)

    assert not warned(1e-4, 283_000)  # the demo's
    assert warned(1e-4, 100_000_000) and not warned(1e-4, 100_000_000, lora__r=8)
    for num_weights in (10**9, 10**11):
        assert [warned(rate, num_weights) for rate in (1e-5, 1.1e-5)] == [False, True]
    (line,) = advice(load(method="dpo", learning_rate=1e-2, lora__r=8), 12_500_000)
    assert "adapters of a model with 12.5M weights" in line and "5e-06 is the default" in line


# ---- the resolved configuration as YAML

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10).filter(
    lambda s: bool(s.strip()) and "\0" not in s and "${" not in s
)
RATES = st.floats(1e-12, 1e3, allow_subnormal=False)
OVERRIDES = st.fixed_dictionaries(
    {"dataset.name": TEXT | st.none(), "dataset.prompt_column": TEXT, "seed": st.integers(0, 2**32 - 1)},
    optional={
        "training.learning_rate": RATES,
        "training.weight_decay": st.floats(0, 10, allow_subnormal=False),
        "training.bf16": st.booleans() | st.none(),
        "training.max_steps": st.integers(1, 2**60),
        "training.gradient_checkpointing": st.booleans() | st.floats(0.01, 0.99, allow_subnormal=False),
        "training.max_seq_length": st.integers(2, 2**40),
        "training.warmup_ratio": st.floats(0, 1, allow_subnormal=False),
        "post_training.method": st.sampled_from(sorted(METHODS)),
        "lora.target_modules": TEXT | st.lists(TEXT, max_size=3),
        "lora.enabled": st.booleans(),
        "lora.r": st.integers(1, 500),
        "gpu.device_ids": st.none() | st.lists(st.integers(0, 9), min_size=1, unique=True),
        "finetuning.greater_is_better": st.booleans() | st.none(),
        "logging.report_to": st.sampled_from([(), ("tensorboard",)]),
    },
)


@given(OVERRIDES, st.lists(st.tuples(TEXT, TEXT.map(lambda s: s.replace("/", "_"))), min_size=1, max_size=2))
def test_the_resolved_yaml_loads_as_an_equal_configuration(
    tmp_path_factory: pytest.TempPathFactory, overrides: dict[str, Any], models: list[tuple[str, str]]
) -> None:
    names = [f"m{i}" for i in range(len(models))]
    overrides["models"] = [{"huggingface_id": m[0], "name": n} for m, n in zip(models, names, strict=True)]
    config = load_config(overrides=overrides)
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(file)
    assert again == config
    assert to_yaml(again.with_origins(config.origins)) == to_yaml(config)


def test_the_resolved_yaml_tells_where_values_came_from(tmp_path: Path) -> None:
    path = tmp_path / "a\u202eb.yaml"
    path.write_text("models: [{huggingface_id: org/model}]\npost_training: {method: dpo, beta: 0.2}\n")
    text = to_yaml(load_config(path, preset="gpu-bf16"))
    assert "  bf16: true  # preset gpu-bf16\n" in text
    assert f"  beta: 0.2  # {tmp_path}/a?b.yaml:2\n" in text
    assert "  lr_scheduler: linear\n" in text
    assert "\u202e" not in text
