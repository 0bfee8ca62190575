"""Checks a loaded model before it trains: strop must compute the log-probs that the model itself computes. Floor 2.

The probe is one small group of random tokens (prefix_sharing.py). First the model scores it with its own code, before
any layer is fused. Then the policy scores it as plain rows and, if prompts may be shared, as a shared row. The results
may differ by rounding. How much depends on the model: more if it is deep, small or initialised with large weights. So
the effect of rounding is measured (`rounding_noise`): the model's own forward pass is repeated with the output of every
layer moved by as much as rounding could move it (Monte Carlo arithmetic, Parker 1997). The means over the scored tokens
may differ by a multiple of that.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strop.batch import Batch, pack, pad
from strop.errors import ModelError
from strop.policy import prefix_sharing
from strop.policy.kernels.fused import unfuse
from strop.policy.model.logit_transform import LogitTransform, measured_transform
from strop.policy.model.task import head_of
from strop.types import Group, judged

if TYPE_CHECKING:
    from strop.policy.policy import Policy

logger = logging.getLogger("strop")

DRAWS = 3
"""Forward passes by which the effect of rounding is measured; the largest one counts."""


@dataclass(frozen=True, slots=True)
class Own:
    """What the model itself computes for the probe.

    logps: [M], natural log. tolerance: how much the mean of another way of scoring may differ. transform: what the
    model does to its logits.
    """

    logps: Tensor
    tolerance: float
    transform: LogitTransform


def own_logps(policy: Policy) -> Own:
    """Log-probs of the probe from the model's own logits; of a reward model, its own rewards.

    Raises:
        ModelError: the model has no linear head, changes its logits in an unknown way, sees later tokens, or computes
            something else in training than in inference.
    """
    head, kind = head_of(policy.base), policy.base.config.model_type
    if head is None or getattr(head, "weight", torch.empty(0)).ndim != 2:
        raise ModelError(
            f"the architecture {kind} has no linear head, so it cannot be trained here", where=policy.where
        )
    _, plain = _rows(policy)
    inputs = {"input_ids": plain.input_ids, "attention_mask": plain.attention_mask}
    if policy.is_reward_model and plain.attention_mask is not None:  # finds the end of a row by its padding tokens
        padding = policy.base.config.get_text_config().pad_token_id
        inputs["input_ids"] = torch.where(plain.attention_mask, plain.input_ids, padding)

    def score() -> Tensor:
        with policy.precision.autocast(policy.device):
            out = policy.model(**inputs, use_cache=False)
        if policy.is_reward_model:
            rewards: Tensor = out.logits.to(policy.precision.master).squeeze(-1)
            return rewards
        logits = out.logits.to(policy.precision.master).flatten(0, 1)[plain.scored_positions]
        scored: Tensor = logits.log_softmax(-1).gather(1, plain.targets[:, None]).squeeze(1)
        return scored

    with policy.scoring():
        own = policy.own_pass(score)
        with inference_mode(policy.model):
            inferred = policy.own_pass(score)
            eps = torch.finfo(policy.precision.compute).eps
            again = partial(policy.own_pass, score)
            noise = max(_rounded(policy.model, eps, seed, again, inferred) for seed in range(DRAWS))
        transform = policy.transform if policy.is_reward_model else policy.own_pass(partial(_measured, policy, inputs))
    tolerance = prefix_sharing.tolerance(policy.precision.compute, noise)
    if not (apart := prefix_sharing.mean_apart(own, inferred)) <= tolerance:
        raise ModelError(
            f"the architecture {kind} has different log-probs in training and in inference (off by {apart:.2g}): its "
            "code is random or different in training, and strop does not know how to switch that off",
            where=policy.where,
        )
    if policy.is_reward_model:  # gives one number per row, of its last token, which sees them all
        return Own(own, tolerance, policy.transform)
    first, third = (
        own[: prefix_sharing.PROBE_UNCHANGED],
        own[-prefix_sharing.PROBE_LENGTHS[1] :][: prefix_sharing.PROBE_UNCHANGED],
    )
    if not prefix_sharing.mean_apart(first, third) <= tolerance:
        raise ModelError(
            f"it sees later tokens, so it is not a causal language model (architecture {kind})", where=policy.where
        )
    if transform is None:
        raise ModelError(
            f"the architecture {kind} changes its logits by something other than one factor or soft cap, so it cannot "
            "be trained here",
            where=policy.where,
        )
    return Own(own, tolerance, transform)


def _measured(policy: Policy, inputs: Mapping[str, Tensor | None]) -> LogitTransform | None:
    with policy.precision.autocast(policy.device):
        return measured_transform(policy.base, policy.body, inputs, policy.transform)


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in eval mode; afterwards every module is in its earlier mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rounded(model: nn.Module, eps: float, seed: int, score: Any, own: Tensor) -> float:
    """How much the mean of `score` changes under random rounding errors, drawn from a seed."""
    with rounding_noise(model, eps, seed):
        return prefix_sharing.mean_apart(score(), own)


@contextmanager
def rounding_noise(model: nn.Module, eps: float, seed: int) -> Iterator[None]:
    """A block in which every output of a layer (one without sublayers) is changed at random by up to eps / 2 of itself,
    which is the size of a rounding error."""
    draw = torch.Generator().manual_seed(seed)

    def moved(_: nn.Module, __: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        by = torch.rand(out.shape, generator=draw).sub_(0.5).mul_(eps).add_(1).to(out.device)
        return (out * by).to(out.dtype) if out.dtype != torch.float64 else out * by.double()

    hooks = [m.register_forward_hook(moved) for m in model.modules() if next(m.children(), None) is None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def probe(policy: Policy, own: Own) -> str | None:
    """Scores the probe in every way that the policy can. Layers that give other results when fused are unfused.

    Returns:
        Why shared rows are not right for this model; None if they are, or are not used.

    Raises:
        ModelError: the policy's log-probs are not those of the model's own logits, or do not depend on any weight that
            trains.
    """
    group, plain = _rows(policy)
    with policy.scoring():
        logps = policy(plain).logps
        if not prefix_sharing.mean_apart(logps, own.logps) <= own.tolerance and unfuse(policy.model):
            logps = policy(plain).logps
            if prefix_sharing.mean_apart(logps, own.logps) <= own.tolerance:
                logger.warning(
                    "%s: its layers give other results in strop's fused form than in their own, which they keep; that "
                    "is slower and takes more memory",
                    policy.where,
                )
        if not (apart := prefix_sharing.mean_apart(logps, own.logps)) <= own.tolerance:
            raise ModelError(
                f"its log-probs are not those of a linear head over its hidden states (off by {apart:.2g}), "
                f"so the architecture {policy.base.config.model_type} cannot be trained here",
                where=policy.where,
            )
        if policy.has_adapters:
            _check_gradients(policy, plain)
        if not policy.share_prefix:
            return None
        apart = prefix_sharing.mean_apart(policy(pack([group]).to(policy.device)).logps, logps)
        if not apart <= own.tolerance:
            return (
                f"shared rows gave other log-probs than plain rows (off by {apart:.2g}; rounding explains up to "
                f"{own.tolerance:.2g})"
            )
    return None


def _check_gradients(policy: Policy, plain: Batch) -> None:
    with torch.enable_grad():
        reached = policy(plain).logps.requires_grad
    if not reached:
        raise ModelError(
            "no gradient of its log-probs reaches any weight that trains",
            where=policy.where,
            expected="adapters on layers that text passes through, in a model whose code passes gradients on",
            fix="name other layers in lora.target_modules, or train all weights (lora.enabled: false)",
        )


def _rows(policy: Policy) -> tuple[Group, Batch]:
    """The group of the probe, and its plain rows."""
    embedding, head = policy.base.get_input_embeddings(), head_of(policy.base)
    if policy.is_reward_model:
        group = prefix_sharing.probe_group(embedding.weight.shape[0])
        group = judged(_without(group, policy.base.config.get_text_config().pad_token_id))
    else:  # a few have inputs of other kinds
        group = prefix_sharing.probe_group(min(table.weight.shape[0] for table in (embedding, head)))
    return group, pad([group]).to(policy.device)


def _without(group: Group, token: int) -> Group:
    """The group with the id before, or after 0, in place of this token."""
    other = token - 1 if token else 1

    def changed(ids: array[int]) -> array[int]:
        return array("q", [other if i == token else i for i in ids])

    completions = tuple(replace(c, ids=changed(c.ids)) for c in group.completions)
    return replace(group, prompt_ids=changed(group.prompt_ids), completions=completions)
