"""What a configuration leaves open, decided and written down; what its values are likely to do. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from strop.config.methods import METHODS, ReferenceSettings, SimpoSettings
from strop.config.run import RunConfig
from strop.config.schema import key_at
from strop.config.sections import FinetuningSection

WARMUP_STEPS = 100
LOSSES = frozenset({"loss", "nll", "perplexity"})
"""Last parts of metrics that are better when smaller."""


def resolve(config: RunConfig) -> RunConfig:
    """Fills in what needs neither data nor devices; a resolved configuration stays as it is.

    `training.learning_rate` by method, `training.warmup_steps` unless a ratio is given,
    `finetuning.greater_is_better` by metric.
    """
    training, finetuning = config.training, config.finetuning
    found: dict[str, Any] = {}
    if training.learning_rate is None:
        found["training.learning_rate"] = METHODS[config.post_training.method].LEARNING_RATE
    if training.warmup_steps is None and training.warmup_ratio is None:
        found["training.warmup_steps"] = WARMUP_STEPS
    if finetuning.greater_is_better is None:
        found["finetuning.greater_is_better"] = _greater_is_better(finetuning)
    return config.with_values(found, {key: default_origin(key) for key in found}) if found else config


def _greater_is_better(finetuning: FinetuningSection) -> bool:
    last = finetuning.metric_for_best_model.removeprefix("eval_").rpartition("/")[2]
    return last not in LOSSES and not last.endswith("_loss")


def default_origin(key: str) -> str:
    """The origin of a value that nobody gave: `default`, with the rule where it depends on other keys."""
    path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    found = key_at(path)
    words = found.extra("x-default") if found else ""
    return f"default: {words}" if words else "default"


def advice(config: RunConfig) -> list[str]:
    """Warnings about values that are allowed and likely to disappoint; the caller prints them."""
    return list(_advice(config))


def _advice(config: RunConfig) -> Iterator[str]:
    method, training = config.post_training, config.training
    rate = training.learning_rate
    if method.method != "sft" and rate is not None:
        adapted = any(map(config.adapts, config.models))
        usual = "5e-6 to 1e-5 is usual for adapters" if adapted else "5e-7 to 1e-6 is recommended"
        if rate > 1e-5:
            yield (
                f"training.learning_rate {rate:g} is high for {method.method}: above 1e-5 preference training tends to "
                f"collapse into nonsense; {usual}"
            )
        elif rate < 1e-7:
            yield (
                f"training.learning_rate {rate:g} is low for {method.method}: below 1e-7 very little is learned; "
                f"{usual}"
            )
    if isinstance(method, ReferenceSettings) and not 0.01 <= method.beta <= 1:
        effect = "leaves the policy almost free of" if method.beta < 0.01 else "holds the policy to"
        yield (
            f"post_training.beta {method.beta:g} lies outside 0.01 to 1: it {effect} the reference; 0.1 to 0.3 is a "
            "usual start"
        )
    if isinstance(method, SimpoSettings) and method.simpo_beta < 1:
        yield (
            f"post_training.simpo_beta {method.simpo_beta:g} is low: it scales a margin per token, and 2 to 10 is "
            "usual; the beta of dpo scales one per completion"
        )
    if isinstance(method, ReferenceSettings) and not method.use_ref_model and config.lora.enabled:
        yield (
            "post_training.use_ref_model false changes nothing under LoRA: the reference is the model without its new "
            "adapter, and takes no memory of its own"
        )
    options = config.finetuning
    if options.greater_is_better not in (None, _greater_is_better(options)):
        best = "highest" if options.greater_is_better else "lowest"
        yield (
            f"finetuning.greater_is_better is {str(options.greater_is_better).lower()}: the best model will be the one "
            f"with the {best} {options.metric_for_best_model}"
        )
    if training.auto_precision and (training.bf16 is not None or training.fp16 is not None):
        yield "training.auto_precision changes nothing: bf16 or fp16 is given"
