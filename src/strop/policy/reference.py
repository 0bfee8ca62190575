"""The models beside a policy: the reference, with the log-probs of groups under it, and the teacher. Floor 2.

The reference is the policy as it is before its first step, so no second model is held in memory, in full training
neither; or it is another model with the same vocabulary, which is freed once the groups are scored. Where groups are
sampled, it is needed in every step: what trains is copied (`FrozenReference`), or the other model stays. A reference
that follows the policy (`SyncedReference`) is a second model in memory.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from strop.batch import TokenScores
from strop.config.methods import DistillSettings
from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ConfigError, ModelError
from strop.policy.allocator import in_halves
from strop.policy.build import assemble, elementwise_of, hash_of, is_sharded, sampling_temperature, strategy_of
from strop.policy.model.folder import place_of
from strop.policy.model.load import load_model
from strop.policy.model.tokenizer import check_vocabulary, load_tokenizer
from strop.policy.policy import Policy
from strop.policy.teacher import Teacher
from strop.types import Group


def micro_batch_logps(policy: Policy, groups: Sequence[Group]) -> tuple[Tensor, bool]:
    """Scores groups as one micro-batch. Call it inside `Policy.scoring`.

    Returns:
        The log-probs [scored tokens of the groups] on the CPU, in float32 (float64 on a float64 model); and whether one
        pass was enough. If memory did not suffice, the groups were scored in halves, which changes the last bits.
    """
    num_passes = 0

    def score(part: Sequence[Group]) -> Tensor:
        nonlocal num_passes
        scored: TokenScores = policy(policy.collate(part))
        logps = scored.logps.cpu()
        num_passes += 1
        return logps

    logps = in_halves(score, groups) if policy.strategy.repeats else score(groups)
    return logps, num_passes == 1


def reference_logps(policy: Policy, micro_batches: Sequence[Sequence[Group]]) -> list[Tensor]:
    """One tensor [scored tokens of the group] per group, on the CPU, in the order of `micro_batches`. All processes
    call it together, each with its own micro-batches, or none.

    It is float32, or float64 on a float64 model. How groups are cut into micro-batches changes rounding only; another
    pass over the same micro-batches by the same model gives the same bits.
    """
    results: list[Tensor] = []
    num_idle = policy.strategy.num_idle(len(micro_batches))
    with policy.scoring(), policy.strategy.passes():
        for batch in micro_batches:
            logps, _ = micro_batch_logps(policy, batch)
            # cloned, because a view would keep the whole micro-batch in memory
            results += [part.clone() for part in torch.split(logps, [g.num_scored for g in batch])]
        for _ in range(num_idle):
            policy.strategy.idle(False)
        policy.strategy.forget_passes()
    return results


class FrozenReference:
    """The policy as it is now, while it goes on training. Only the weights that train are copied, each process what it
    holds of them: for the passes of the reference they take the place of the policy's own.

    Args:
        policy: before its first step, and before a checkpoint is loaded into it.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = {name: weight.detach().clone() for name, weight in policy.strategy.trained.items()}

    def logps(self, micro_batches: Sequence[Sequence[Group]]) -> list[Tensor]:
        """As `reference_logps`, under the weights of then."""
        self._swap()
        try:
            return reference_logps(self._policy, micro_batches)
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._policy.strategy.trained.items():
            now = weight.detach().clone()
            weight.detach().copy_(self._weights[name])  # in place: a sharded layer is gathered from this memory
            self._weights[name] = now


class SyncedReference:
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656): a second model, which scores every batch.

    Args:
        policy: before its first step, trained in full.
        every_steps, share: every so many steps, the weights become share x the policy's + (1 - share) x their own.
    """

    def __init__(self, policy: Policy, every_steps: int, share: float) -> None:
        self._leader, self._every, self._share = policy.trainable(), every_steps, share
        self._copy = copy.deepcopy(policy)
        self.weights = {name: weight.detach() for name, weight in self._copy.trainable().items()}
        """The weights that follow the policy, by the names of `Policy.trainable`."""
        self._copy.requires_grad_(False)

    def logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """One tensor [scored tokens] per group; they are scored as one micro-batch."""
        return reference_logps(self._copy, [groups])

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Moves the weights towards the policy's, if this step is one of those."""
        if step % self._every == 0:
            for name, weight in self.weights.items():
                weight.lerp_(self._leader[name], self._share)


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
    """Errors of the block name the reference as their place."""
    try:
        yield
    except ModelError as error:
        raise ModelError(error.found, where=where, expected=error.expected, fix=error.fix) from error
