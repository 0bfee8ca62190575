"""Loads the models beside a policy: the reference that `ref_model_id` names, and the teacher. Floor 2.

Without `ref_model_id` the reference is the policy as it is before its first step, so no second model is held in memory,
in full training neither. Another model has to have the same vocabulary. It is freed once the groups are scored; where
groups are sampled, it stays.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from strop.config.methods import DistillSettings
from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ConfigError, ModelError
from strop.policy.build import assemble, elementwise_of, hash_of, is_sharded, sampling_temperature, strategy_of
from strop.policy.model.folder import place_of
from strop.policy.model.load import load_model
from strop.policy.model.tokenizer import check_vocabulary, load_tokenizer
from strop.policy.policy import Policy
from strop.policy.teacher import Teacher


@contextmanager
def reference_policy(
    config: RunConfig, model: ModelSection, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Policy]:
    """A block with the model that is the reference: `policy` itself, or the model of `ref_model_id`, which is freed at
    the end. Use it before the first step, and before a checkpoint is loaded into the policy.

    Raises:
        ModelError: `ref_model_id` cannot be loaded or has another vocabulary.
    """
    other = _reference(config, model)
    if other is None:
        yield policy
        return
    reference = _load(config, other, policy, tokenizer)
    try:
        yield reference
    finally:
        reference.model = nn.Identity()  # the caller's name for it may outlive the block
        del reference
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_others(config: RunConfig, model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks the folder and the vocabulary of `ref_model_id` and of the teacher before any weight is loaded.

    Raises:
        ConfigError: the method needs a teacher, and none is named.
        ModelError: a model does not exist, or has another vocabulary.
    """
    others = [_reference(config, model)]
    if isinstance(config.post_training, DistillSettings):
        others.append(_teacher(config, model))
    for other in others:
        if other is not None:
            _its_tokenizer(other, tokenizer)


def attach_teacher(config: RunConfig, model: ModelSection, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the policy its teacher, if the method has one. Where the teacher cannot share prompts, neither does the
    policy: both read the same batches.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary.
    """
    settings = config.post_training
    if not isinstance(settings, DistillSettings):
        return
    teacher = _load(config, _teacher(config, model), policy, tokenizer)
    if not teacher.share_prefix and policy.share_prefix:
        policy.share_prefix, policy.plain_reason = False, f"the teacher cannot: {teacher.plain_reason}"
    policy.teacher = Teacher(teacher, settings.beta, settings.temperature)


def teacher_section(config: RunConfig, model: ModelSection) -> ModelSection | None:
    """The teacher as a model to load; None where the method has none."""
    return _teacher(config, model).section if isinstance(config.post_training, DistillSettings) else None


@dataclass(frozen=True, slots=True)
class _Other:
    """A model beside the policy. where, fix: for messages."""

    section: ModelSection
    where: str
    fix: str


def _teacher(config: RunConfig, model: ModelSection) -> _Other:
    teacher_model_id = getattr(config.post_training, "teacher_model_id", None)
    if teacher_model_id is None:
        raise ConfigError(
            "there is no teacher to learn from",
            where="post_training.teacher_model_id",
            expected="a hub id or a folder of a model with the same vocabulary",
            fix="set post_training.teacher_model_id",
        )
    section = _beside(model, teacher_model_id)
    return _Other(section, f"teacher {place_of(section)}", "choose another post_training.teacher_model_id")


def _beside(model: ModelSection, huggingface_id: str) -> ModelSection:
    """Another model that reads what `model` reads: it gets the same new tokens."""
    return ModelSection(
        huggingface_id=huggingface_id, trust_remote_code=model.trust_remote_code, add_tokens=model.add_tokens
    )


def _reference(config: RunConfig, model: ModelSection) -> _Other | None:
    ref_model_id = getattr(config.post_training, "ref_model_id", None)
    if ref_model_id is None:
        return None
    section = _beside(model, ref_model_id)
    fix = "choose another post_training.ref_model_id, or drop it: the reference is then the initial policy"
    return _Other(section, f"reference {place_of(section)}", fix)


def _its_tokenizer(other: _Other, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    with _named(other.where):
        its_tokenizer = load_tokenizer(other.section)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        differing = len(set(its_tokenizer.get_vocab().items()) ^ set(tokenizer.get_vocab().items()))
        raise ModelError(
            f"its tokenizer is not the policy's: {differing} entries differ",
            where=other.where,
            expected="a model with the same vocabulary",
            fix=other.fix,
        )
    return its_tokenizer


def _load(config: RunConfig, other: _Other, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Another model with the policy's vocabulary, frozen, on its device.

    Raises:
        ModelError: it cannot be loaded, or has another vocabulary.
    """
    section, where, world = other.section, other.where, policy.strategy.world
    its_tokenizer = _its_tokenizer(other, tokenizer)
    with _named(where):
        is_in_parts = is_sharded(config, world)
        loaded = load_model(section, dtype=policy.precision.compute, sharded=is_in_parts, defer=is_in_parts)
    check_vocabulary(its_tokenizer, loaded.module, where)
    rows, own = (m.get_input_embeddings().weight.shape[0] for m in (loaded.module, policy.base))
    if rows != own:
        raise ModelError(
            f"its embedding has {rows} rows, the policy's {own}",
            where=where,
            expected="a model with the same vocabulary",
            fix=other.fix,
        )
    digest = hash_of(loaded.module, loaded, world)
    return assemble(
        loaded.module.requires_grad_(False),
        loaded,
        policy.precision,
        section,
        fp32_logits=config.training.fp32_logits,
        elementwise=elementwise_of(config.training, policy.device),
        weights_hash=digest,
        temperature=sampling_temperature(config),
        place=strategy_of(config, world, loaded.deferred),
    )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of the block name that model as their place."""
    try:
        yield
    except ModelError as error:
        raise ModelError(error.found, where=where, expected=error.expected, fix=error.fix) from error
