"""What a configuration leaves open, decided and written down; what its values are likely to do. Floor 1, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from strop.config.methods import METHODS, GrpoSettings
from strop.config.run import RunConfig
from strop.config.schema import key_at
from strop.config.sections import FinetuningSection, ModelSection

WARMUP_RATIO = 0.1
"""Share of the steps that warm up where neither `warmup_steps` nor `warmup_ratio` is given."""
ADAPTER_FACTOR = 10
"""How much higher a rate adapters take than all weights do."""
LOSSES = frozenset({"loss", "nll", "perplexity", "divergence", "reverse_kl"})
"""First or last parts of metrics that are better when smaller: `loss/preference` is one term of a loss."""
HIGHEST, LOWEST = 1e-5, 1e-7
"""Learning rates of preference training, of all weights of a model of `USUAL_SIZE` or more, that are warned of."""
USUAL_SIZE = 1e9
"""Weights. Smaller models stand higher rates, by the root of how much smaller they are."""


def resolve(config: RunConfig) -> RunConfig:
    """Fills in what needs neither data nor devices; a resolved configuration stays as it is.

    `training.learning_rate` by method and by what trains (open where some models train adapters and others all
    weights: `of_model` decides then), `training.warmup_ratio` unless steps are given, no
    `training.max_completion_length` for sft, no `dataset.validation_split` with rollout,
    `post_training.normalizer_length` from `training.max_completion_length` for grpo, `finetuning.metric_for_best_model`
    eval_reward with rollout but for distill, `finetuning.greater_is_better` by metric.
    """
    training, finetuning = config.training, config.finetuning
    found: dict[str, Any] = {}
    adapts = {config.adapts(model) for model in config.models}
    if training.learning_rate is None and len(adapts) == 1:
        found["training.learning_rate"] = usual_rate(config.post_training.method, True in adapts)
    if training.warmup_steps is None and training.warmup_ratio is None:
        found["training.warmup_ratio"] = WARMUP_RATIO
    if config.post_training.method == "sft" and "max_completion_length" not in training.model_fields_set:
        found["training.max_completion_length"] = None
    if config.rollout.enabled and "validation_split" not in config.dataset.model_fields_set:
        found["dataset.validation_split"] = 0.0
    method, length = config.post_training, training.max_completion_length
    if (
        isinstance(method, GrpoSettings)
        and method.aggregation == "constant"
        and method.normalizer_length is None
        and length is not None
    ):
        found["post_training.normalizer_length"] = length
    is_rewarded = config.rollout.enabled and method.REWARDED
    if is_rewarded and "metric_for_best_model" not in finetuning.model_fields_set:
        found["finetuning.metric_for_best_model"] = "eval_reward"
        finetuning = finetuning.model_copy(update={"metric_for_best_model": "eval_reward"})
    if finetuning.greater_is_better is None:
        found["finetuning.greater_is_better"] = _greater_is_better(finetuning)
    return config.with_values(found, {key: default_origin(key) for key in found}) if found else config


def of_model(config: RunConfig, model: ModelSection) -> RunConfig:
    """The configuration of one model's run: this model alone, and what depends on it decided."""
    return resolve(config.model_copy(update={"models": (model,)}))


def usual_rate(method: str, adapted: bool) -> float:
    """The learning rate of a method that is given none. adapted: adapters are trained."""
    rate = METHODS[method].LEARNING_RATE * (ADAPTER_FACTOR if adapted else 1)
    return float(f"{rate:.6g}")  # 5e-6, not 4.9999999999999996e-06


def _greater_is_better(finetuning: FinetuningSection) -> bool:
    parts = finetuning.metric_for_best_model.removeprefix("eval_").split("/")
    return not LOSSES & {parts[0], parts[-1]} and not parts[-1].endswith("_loss")


def default_origin(key: str) -> str:
    """The origin of a value that nobody gave: `default`, with the rule where it depends on other keys."""
    path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    found = key_at(path)
    words = found.extra("x-default") if found else ""
    return f"default: {words}" if words else "default"


def is_default(origin: str) -> bool:
    """Whether an origin is that of a value that nobody gave (`default_origin`). A file may be called default.yaml."""
    return origin == "default" or origin.startswith("default: ")


def advice(config: RunConfig, num_weights: int | None = None) -> list[str]:
    """Warnings about values that are allowed and likely to disappoint; the caller prints them.

    num_weights: of the model, or None where it is not known.
    """
    return list(_advice(config, num_weights))


def _advice(config: RunConfig, num_weights: int | None) -> Iterator[str]:
    training = config.training
    yield from _about_the_rate(config, num_weights)
    yield from config.post_training.advice(config)
    options = config.finetuning
    if options.greater_is_better not in (None, _greater_is_better(options)):
        best = "highest" if options.greater_is_better else "lowest"
        yield (
            f"finetuning.greater_is_better is {str(options.greater_is_better).lower()}: the best model will be the one "
            f"with the {best} {options.metric_for_best_model}"
        )
    decided = config.origins.get("training.bf16", "").startswith("auto_precision")
    if training.auto_precision and not decided and (training.bf16 is not None or training.fp16 is not None):
        yield "training.auto_precision changes nothing: bf16 or fp16 is given"


def _about_the_rate(config: RunConfig, num_weights: int | None) -> Iterator[str]:
    """Preference training collapses above some rate, which depends on what trains and on the size of the model. What
    imitates rows, and a reward model, which writes nothing, stand higher ones."""
    method, rate = config.post_training.method, config.training.learning_rate
    if METHODS[method].ROWS == "single" or METHODS[method].REWARD_MODEL or rate is None:
        return
    adapted = any(map(config.adapts, config.models))
    factor = ADAPTER_FACTOR if adapted else 1
    smaller = max(1.0, math.sqrt(USUAL_SIZE / num_weights)) if num_weights else 1.0
    highest, lowest = HIGHEST * factor * smaller, LOWEST * factor
    what = "adapters" if adapted else "all weights"
    if num_weights and num_weights < USUAL_SIZE:
        what += f" of a model with {in_millions(num_weights)} weights"
    usual = f"{usual_rate(method, adapted):g} is the default"
    if rate > highest * 1.001:  # 1e-5 times ten is not quite 1e-4
        yield (
            f"training.learning_rate {rate:g} is high for {method} with {what}: above {highest:.2g} preference "
            f"training tends to collapse into nonsense; {usual}"
        )
    elif rate < lowest / 1.001:
        yield (
            f"training.learning_rate {rate:g} is low for {method} with {what}: below {lowest:.2g} very little is "
            f"learned; {usual}"
        )


def in_millions(number: int) -> str:
    """A large number for a person: `135M`, `0.3M`, `7B`."""
    return f"{number / 1e9:.2g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"
