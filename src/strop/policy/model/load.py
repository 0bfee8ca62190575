"""A model section to a model, or to one clear message. Floor 2.

Loading is strict: safetensors only, every weight of the model in the files and every shape right, finite numbers. The
model's own dropout is switched off: only `lora.lora_dropout` acts.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from strop.config.sections import ModelSection
from strop.errors import ModelError, first_line, foreign_errors
from strop.policy.memory_attempts import is_out_of_memory
from strop.policy.model import quantised_base
from strop.policy.model.added_tokens import NewTokens, add_rows
from strop.policy.model.configuration import LOAD_ERRORS, build_config, check_task, quiet
from strop.policy.model.deferred_weights import DeferredWeights
from strop.policy.model.folder import inspect_model, place_of
from strop.policy.model.folder_safety import check_sealed
from strop.policy.model.quantisation_settings import quantisation_of
from strop.policy.model.random_parts import silence_config, silence_modules
from strop.policy.model.shape_check import check_config_against_files, other_shape
from strop.policy.model.task import SCORE, WRITING_HEADS, with_one_label
from strop.policy.model.tokenizer import new_tokens
from strop.policy.model.weight_reading import ModelReading
from strop.policy.precision import nonfinite
from strop.readable import short_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("strop")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """module: on the CPU, in the mode that whoever made it left it in. stored: dtype of the weights in the files.
    config: the model's configuration as it was before strop changed it for training, which is what is saved with the
    result. new_head: the files hold no head of a reward model, and its weights mean nothing yet. new_tokens: ids of
    the tokens that `models[].add_tokens` added. deferred: the weights that are still in the files; None: all are
    loaded."""

    module: PreTrainedModel
    stored: torch.dtype
    config: PreTrainedConfig
    new_head: bool = False
    new_tokens: tuple[int, ...] = ()
    deferred: DeferredWeights | None = None


@contextmanager
def model_errors(where: str, doing: str) -> Iterator[None]:
    """What a model's own code raises, as one error; running out of memory comes through.

    Raises:
        ModelError: anything else went wrong.
    """

    def failed(why: str) -> ModelError:
        return ModelError(
            f"{doing} fails: {why}",
            where=where,
            expected="a config.json that belongs to the weights",
            fix="download or copy config.json again; it is what decides how the model computes",
        )

    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error) or not isinstance(error, Exception):
            raise
        with foreign_errors(failed):
            raise


def load_model(
    model: ModelSection,
    *,
    dtype: torch.dtype,
    reward_model: bool = False,
    sharded: bool = False,
    defer: bool = False,
) -> LoadedModel:
    """The model on the CPU, its weights in `dtype`, or quantised as the section says; its dropout off.

    Args:
        reward_model: load it as a reward model; a language model gets a new head, and loses its own.
        sharded: its weights will be sharded over several processes.
        defer: leave the weights in their files (deferred_weights.py), if each is a tensor of its own there.

    Raises:
        ModelError: it cannot be loaded completely and safely as a causal language model, or as a reward model.
    """
    where, files, bits = place_of(model), inspect_model(model), quantisation_of(model)
    if sharded:
        quantised_base.check_shardable(bits, where)
    if os.path.isdir(files.source):
        check_sealed(Path(files.source), where, weights=True)
    if files.ignored:
        names = ", ".join(files.ignored)
        logger.warning("%s: ignored in config.json, since trust_remote_code is false: %s", where, names)
    if model.revision is not None and os.path.isdir(files.source):
        logger.warning("%s: revision %s is not read: the model is a folder on this machine", where, model.revision)
    config = build_config(model, files, where)
    check_task(config, where, reward_model=reward_model)
    if reward_model:
        with_one_label(config)
    check_config_against_files(config, files, model, where, reward_model=reward_model)
    original = copy.deepcopy(config)
    silenced = silence_config(config)
    quantised_base.compute_in(config, dtype)
    attention = _plain_attention(model, config, where)
    new = new_tokens(model)
    defer = defer and bits is None and _can_wait(config, new)
    try:
        # transformers draws the weights of a new head; the caller's random numbers stay as they were
        with quiet(), torch.random.fork_rng(devices=[]):
            quantising = quantised_base.loading(bits, dtype, sharded=sharded)
            reading = ModelReading(model, files, config, dtype, attention, quantising, reward_model)
            module, report, waiting = reading.read(defer=defer)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"it cannot be loaded: {first_line(error)}",
            where=where,
            fix="check models[].attn_implementation" if attention else "download or save the model again",
        ) from error
    new_head = _check_complete(report, where, reward_model=reward_model)
    left_out = quantised_base.packed_names(module) | (set() if waiting is None else waiting.names.keys())
    check_finite({name: weight for name, weight in module.named_parameters() if name not in left_out}, where)
    add_rows(module, original, new, where)
    quantised_base.settle(module, bits, where)
    _tell_silenced(silenced | silence_modules(module), where)
    module.config.use_cache = False
    return LoadedModel(module, files.stored, original, new_head, new.ids, waiting)


def _tell_silenced(silenced: Mapping[str, float], where: str) -> None:
    if silenced:
        values = ", ".join(f"{name} {value:g}" for name, value in sorted(silenced.items()))
        logger.info("%s: its own dropout is off while training (%s); only lora_dropout acts", where, values)


def _can_wait(config: PreTrainedConfig, new: NewTokens) -> bool:
    """Whether weights can stay in the files: rows that are made for new tokens begin as the mean of the others."""
    return not new.ids and new.num_rows <= getattr(config.get_text_config(), "vocab_size", 0)


def _plain_attention(model: ModelSection, config: PreTrainedConfig, where: str) -> dict[str, str]:
    """The attention of plain rows, where it is not transformers' choice; its choice for capped scores has been sdpa,
    which leaves the cap out."""
    name = model.attn_implementation
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if name is None:
        return {"attn_implementation": "eager"} if capped else {}
    if capped and name == "sdpa":
        raise ModelError(
            "attn_implementation: sdpa cannot cap attention scores, as this model does (attn_logit_softcapping)",
            where=where,
            fix="set models[].attn_implementation to eager, or leave it out",
        )
    if "/" in name and not model.trust_remote_code:
        raise ModelError(
            f"attn_implementation: {name!r} names a kernel on the hub, which is code",
            where=where,
            expected="sdpa, eager, flash_attention_2, ...",
            fix="set models[].trust_remote_code: true if you trust its source",
        )
    return {"attn_implementation": name}


def _check_complete(report: Mapping[str, Any], where: str, *, reward_model: bool) -> bool:
    """transformers fills gaps with random numbers and a warning; here every gap is an error, but for the head of a
    reward model. Returns whether that is missing."""
    absent, mismatched = set(report["missing_keys"]), sorted(report["mismatched_keys"])
    heads = {name for name in absent if reward_model and name.startswith(f"{SCORE}.")}
    missing = sorted(absent - heads)
    if mismatched:
        raise other_shape(mismatched, where)
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from its files, the first is {missing[0]}",
            where=where,
            expected="every weight of the model; a missing one would be random",
            fix="download the model again, completely",
        )
    left_out = set(report["unexpected_keys"])
    if reward_model:  # the head of the language model that it is made of
        left_out = {name for name in left_out if not name.startswith(WRITING_HEADS)}
    if unexpected := sorted(left_out):
        logger.warning(
            "%s: %d tensors in its files are not part of the model and are left out, the first is %s",
            where,
            len(unexpected),
            unexpected[0],
        )
    return bool(heads)


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that no training can start from.

    Raises:
        ModelError: one of them holds NaN or infinity.
    """
    if bad := nonfinite(weights):
        raise ModelError(
            f"{bad[0]} holds NaN or infinity (as {short_name(weights[bad[0]].dtype)})",
            where=where,
            expected="finite weights",
            fix="download the model again; if it is whole, it is broken, or too large for float16",
        )
