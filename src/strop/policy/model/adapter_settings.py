"""What an adapter says of itself in adapter_config.json, and whether it can be continued or merged here. Floor 2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from strop import time_limit
from strop.config.sections import LoraSection, ModelSection
from strop.errors import ModelError, foreign_errors
from strop.policy.model.configuration import quiet
from strop.policy.model.folder import adapter_files, adapter_place_of, read_json

# what peft calls the settings of kinds of LoRA that can be neither continued nor merged here
_FOREIGN = (
    "megatron_config",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")
"""Settings that are names of modules; peft takes them as they are and fails on others where it uses them."""
AGAIN = "copy or download the adapter again"
"""What to do about an adapter that is not as it was saved."""
_INITS = (True, False, "gaussian", "orthogonal")
_SHARED = ("r", "lora_alpha", "bias", "use_rslora", "use_dora", "init_lora_weights")


def adapters_of(lora: LoraSection, model: ModelSection) -> LoraSection | None:
    """The section of the adapters that a run trains: `lora`, with the rank and the layers of an adapter that is
    continued; None where it trains in full.

    Raises:
        ModelError: the adapter cannot be read.
    """
    if model.adapter is None:
        return lora if lora.enabled else None
    where = adapter_place_of(model)
    config = adapter_config(read_adapter(model.adapter, where)[0], lora, where)
    targets, saved = config.target_modules, config.modules_to_save
    return lora.model_copy(
        update={
            "r": config.r,
            "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets or ())),
            "modules_to_save": tuple(saved) if saved else None,
            "target_parameters": tuple(config.target_parameters or ()) or None,
        }
    )


def read_adapter(adapter: str, where: str) -> tuple[dict[str, Any], Path]:
    """The settings of an adapter, and the file of its weights.

    Raises:
        ModelError: there is no such adapter, or its settings cannot be read.
    """
    config, weights = adapter_files(adapter, where)
    return read_json(config, where), weights


def try_patterns(settings: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Match the regular expressions of an adapter, which anyone may have written, in a process that can be ended.

    Args:
        names: of modules, to match them with.

    Raises:
        ModelError: one takes too long.
    """
    found = [settings.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    found += [key for name in ("rank_pattern", "alpha_pattern") for key in settings.get(name) or ()]
    patterns = [text for text in found if isinstance(text, str)]
    if not any(set(text) & set("*+{?|(") for text in patterns):
        return
    try:
        time_limit.tried(_match, patterns, names, seconds=PATTERN_SECONDS)
    except time_limit.TooMuch as limit:
        raise ModelError(
            f"a regular expression in adapter_config.json takes more than {limit}",
            where=where,
            expected="names of modules, or expressions that are matched at once",
            fix="write the names of the modules into target_modules, rank_pattern and alpha_pattern",
        ) from limit


def _match(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        for name in names:
            re.fullmatch(pattern, name)
            re.match(rf"(.*\.)?({pattern})$", name)


PATTERN_SECONDS = 10.0
USUAL_NAMES = [
    f"{stem}.{layer}.{part}"
    for stem in ("model.layers", "transformer.h", "model.language_model.layers")
    for layer in (0, 10)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "attn.c_attn", "mlp.c_proj")
]
"""What modules are called: before a model is there, expressions are tried on these."""


def adapter_config(settings: Mapping[str, Any], lora: LoraSection, where: str) -> LoraConfig:
    """The settings of an adapter that is continued: its own, with the section's dropout.

    Raises:
        ModelError: it is no LoRA adapter, of a kind that cannot be continued, or the section says something else.
    """
    with foreign_errors(lambda why: ModelError(f"adapter_config.json: {why}", where=where)), quiet():
        return _read_config(settings, lora, where)


def mergeable_config(settings: Mapping[str, Any], names: Sequence[str], where: str) -> LoraConfig:
    """The settings of an adapter that is to be merged, as they are in adapter_config.json.

    Args:
        names: of the modules of its base.

    Raises:
        ModelError: it is no LoRA adapter, or of a kind that cannot be merged here.
    """
    with foreign_errors(lambda why: ModelError(f"adapter_config.json: {why}", where=where)), quiet():
        try_patterns(settings, names, where)
        return LoraConfig(**{**_known(settings, "merged", where), "inference_mode": True})


def _read_config(settings: Mapping[str, Any], lora: LoraSection, where: str) -> LoraConfig:
    try_patterns(settings, USUAL_NAMES, where)
    known = _known(settings, "continued", where)
    dropout = 0.0 if settings.get("target_parameters") else lora.lora_dropout  # peft has none on experts
    config = LoraConfig(**{**known, "inference_mode": False, "lora_dropout": dropout})
    _check_same(config, lora, where)
    return config


def _known(settings: Mapping[str, Any], what: str, where: str) -> dict[str, Any]:
    """The settings that this version of peft knows. what: `continued` or `merged`, for messages.

    Raises:
        ModelError: it is no LoRA adapter, or of a kind that can be neither.
    """
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"it is of the kind {settings.get('peft_type')}",
            where=where,
            expected="LORA",
            fix="merge it into the model with peft, and use that",
        )
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int if name == "r" else int | float) or value <= 0:
            raise ModelError(
                f"adapter_config.json: {name} is {value!r:.80}",
                where=where,
                expected="a number above 0" if name == "lora_alpha" else "a whole number above 0",
                fix=AGAIN,
            )
    for name in _NAMES:
        if not _are_names(settings.get(name)):
            raise ModelError(f"{name} is {settings[name]!r:.80}", where=where, expected="names of modules, or null")
    foreign = [name for name in _FOREIGN if settings.get(name)]
    if foreign or settings.get("init_lora_weights", True) not in _INITS:
        raise ModelError(
            f"it uses {', '.join(foreign) or 'init_lora_weights: ' + str(settings['init_lora_weights'])}, "
            f"which cannot be {what}",
            where=where,
            fix="merge it into the model with peft, and use that",
        )
    return {k: v for k, v in settings.items() if k in LoraConfig.__dataclass_fields__ and k != "auto_mapping"}


def _are_names(value: Any) -> bool:
    """Whether it is a name or a regular expression, a list of names, or nothing."""
    if isinstance(value, list | tuple | set):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


def _check_same(config: LoraConfig, lora: LoraSection, where: str) -> None:
    """Settings that are not the section's defaults must be the adapter's own: they cannot be changed any more."""
    default, differing = LoraSection(), []
    for name in _SHARED:
        ours, theirs = getattr(lora, name), getattr(config, name)
        derived = name == "lora_alpha" and ours == 2 * lora.r
        if ours != theirs and ours != getattr(default, name) and not derived:
            differing.append(f"{name}: {ours} here, {theirs} in the adapter")
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        ours, theirs = as_list(getattr(lora, name)), as_list(getattr(config, name))
        if ours and ours not in (["auto"], ["all-linear"]) and set(ours) != set(theirs):
            differing.append(f"{name}: {', '.join(ours)} here, {', '.join(sorted(theirs))} in the adapter")
    if differing:
        raise ModelError(
            f"the lora section differs from the adapter that is to be continued: {'; '.join(differing)}",
            where=where,
            fix="remove these keys from lora, or remove models[].adapter to start a new adapter",
        )


def as_list(names: Any) -> list[str]:
    """Names of layers as a list; settings may hold a list, one name, or nothing."""
    return [names] if isinstance(names, str) else list(names or ())
