"""A model without its weights, held against the headers of the files before any weight is read or made. Floor 2.

transformers makes every weight that the files lack or have in another shape, at the size that config.json says; a
config.json of a much larger model would fill the memory before anything is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from strop.config.sections import ModelSection
from strop.errors import ModelError, first_line
from strop.policy.model.configuration import LOAD_ERRORS, model_config, quiet
from strop.policy.model.folder import STORED, ModelFiles, inspect_model, place_of
from strop.policy.model.task import auto_class

FAR = 2
"""config.json is refused where it describes this many times the weights that the files hold, whatever their names."""

SAME_MODEL = "use the config.json and the weights of one and the same model"

Mismatch = tuple[str, Sequence[int], Sequence[int]]
"""Name, shape in the files, shape in the model."""


def meta_model(config: PreTrainedConfig, *, trust_remote_code: bool, reward_model: bool = False) -> PreTrainedModel:
    """The model on torch's meta device: shapes without weights, tied ones once. Raises whatever transformers does."""
    kind = auto_class(reward_model=reward_model)
    with torch.device("meta"):
        module: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code)
        module.tie_weights()
    return module


def check_shapes(model: ModelSection) -> None:
    """Refuse a config.json that describes a larger model than the weights beside it; no weight is read.

    Raises:
        ModelError: it does; or the model is not one that may be loaded.
    """
    check_config_against_files(model_config(model), inspect_model(model), model, place_of(model))


def check_same_shapes(model: ModelSection) -> None:
    """Refuse a folder whose config.json and weights are not of one model, as far as shapes tell; no weight is read.

    Raises:
        ModelError: they are not; or the model is not one that may be loaded.
    """
    where, files = place_of(model), inspect_model(model)
    if "auto_map" in files.ignored:  # code of its own says what it consists of
        return
    config = model_config(model)
    judges = any("SequenceClassification" in name for name in config.architectures or ())
    check_config_against_files(config, files, model, where, reward_model=judges)
    if files.config.get("quantization_config"):
        return
    try:
        with quiet():
            module = meta_model(config, trust_remote_code=False, reward_model=judges)
    except LOAD_ERRORS as error:
        raise ModelError(f"its configuration builds no model: {first_line(error)}", where=where) from error
    wanted = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    stored = {name: shape for name, shape, _ in _headers(files.weights)}
    if wrong := sorted((n, stored[n], size) for n, size in wanted.items() if stored.get(n, size) != size):
        raise other_shape(wrong, where)


def check_config_against_files(
    config: PreTrainedConfig, files: ModelFiles, model: ModelSection, where: str, *, reward_model: bool = False
) -> None:
    """`check_shapes`, of what is known already.

    What is smaller in config.json than in the files costs no more memory than the files, and is found when they are
    read; names that transformers changes while it reads are known only then.

    Raises:
        ModelError: config.json describes more weights than there are.
    """
    try:
        with quiet():
            own = copy.deepcopy(config)
            module = meta_model(own, trust_remote_code=model.trust_remote_code, reward_model=reward_model)
    except LOAD_ERRORS:
        return  # loading it says what is wrong
    headers = list(_headers(files.weights))
    stored = {name: shape for name, shape, _ in headers}
    wanted = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    if not files.config.get("quantization_config"):
        _check_floats(headers, wanted, module.base_model_prefix, where)
    packed = {name for name in stored if f"{name}.absmax" in stored}  # 4 bits, whose shapes are not those of weights
    stored = {name: size for name, size in stored.items() if not any(name.startswith(part) for part in packed)}
    wanted = {name: size for name, size in wanted.items() if name not in packed}
    has, needs = sum(map(prod, stored.values())), sum(map(prod, wanted.values()))
    if needs <= has:
        return
    if wrong := sorted((name, stored[name], size) for name, size in wanted.items() if stored.get(name, size) != size):
        raise other_shape(wrong, where)
    if needs > FAR * has:
        raise ModelError(
            f"config.json describes a model of {needs:,} weights, and its files hold {has:,}",
            where=where,
            fix=SAME_MODEL,
        )


def other_shape(wrong: Sequence[Mismatch], where: str) -> ModelError:
    """The error for weights in the files that have another shape than in the model."""
    name, found, expected = wrong[0]
    return ModelError(
        f"{len(wrong)} weights have another shape than config.json says, the first is {name}: {list(found)}",
        where=where,
        expected=str(list(expected)),
        fix=SAME_MODEL,
    )


def _check_floats(
    headers: Sequence[tuple[str, tuple[int, ...], str]], wanted: Container[str], prefix: str, where: str
) -> None:
    """Refuse weights that are stored as integers or in 8 bits: what they stand for, nothing beside them says.

    wanted: names of the weights of the model. prefix: which files may leave out.
    """
    for name, _, dtype in headers:
        if dtype not in STORED and (name in wanted or f"{prefix}.{name}" in wanted):
            raise ModelError(
                f"{name} is stored as {dtype}, and config.json does not say how it is quantised",
                where=where,
                expected=f"one of {', '.join(STORED)}; or a quantization_config",
                fix="download or copy config.json again, or name the model that it was made from",
            )


def _headers(files: Sequence[Path]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of all tensors, by the headers of the files."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                part = tensors.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
