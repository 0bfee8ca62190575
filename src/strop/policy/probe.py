"""What a loaded model is asked before it trains: whether strop's way of scoring it gives its own log-probs. Floor 2.

The probe is one small group of random tokens (prefix_sharing.py). The model scores it by its own code, before any
layer gets another forward; then the policy does as plain rows and, where prompts may be shared, as a shared row. Two
ways of scoring may differ by rounding, and how much that is depends on the model: deep, small or widely initialised
ones move further. So it is measured (`rounding_noise`): the model's own forward once more, with every layer's output
moved by as much as rounding may move it (Monte Carlo arithmetic, Parker 1997). Ways are compared by the mean over the
scored tokens, against that noise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strop.batch import Batch, pack, pad
from strop.errors import ModelError
from strop.policy import prefix_sharing
from strop.policy.kernels.fused import unfuse
from strop.policy.model.logit_transform import LogitTransform, measured_transform
from strop.types import Group

if TYPE_CHECKING:
    from strop.policy.policy import Policy

logger = logging.getLogger("strop")

DRAWS = 3
"""Forward passes that the noise of rounding is measured by; the largest counts."""


@dataclass(frozen=True, slots=True)
class Own:
    """The model's own answer. logps: [M], natural log. tolerance: how far the mean of another way may lie from it.
    transform: what it does to its logits."""

    logps: Tensor
    tolerance: float
    transform: LogitTransform


def own_logps(policy: Policy) -> Own:
    """Log-probs of the probe from the model's own logits.

    Raises:
        ModelError: it has no linear head, does to its logits what is not known here, sees later tokens, or is another
            model in training than in inference.
    """
    head, kind = policy.base.get_output_embeddings(), policy.base.config.model_type
    if head is None or getattr(head, "weight", torch.empty(0)).ndim != 2:
        raise ModelError(
            f"the architecture {kind} has no linear head, so it cannot be trained here", where=policy.where
        )
    _, plain = _rows(policy)
    inputs = {"input_ids": plain.input_ids, "attention_mask": plain.attention_mask}

    def score() -> Tensor:
        with policy.precision.autocast(policy.device):
            out = policy.model(**inputs, use_cache=False)
        logits = out.logits.to(policy.precision.master).flatten(0, 1)[plain.scored_positions]
        scored: Tensor = logits.log_softmax(-1).gather(1, plain.targets[:, None]).squeeze(1)
        return scored

    with policy.scoring():
        own = score()
        with inference_mode(policy.model):
            inferred = score()
            eps = torch.finfo(policy.precision.compute).eps
            noise = max(_rounded(policy.model, eps, seed, score, inferred) for seed in range(DRAWS))
        with policy.precision.autocast(policy.device):
            transform = measured_transform(policy.base, policy.body, inputs, policy.transform)
    tolerance = prefix_sharing.tolerance(policy.precision.compute, noise)
    if not (apart := prefix_sharing.mean_apart(own, inferred)) <= tolerance:
        raise ModelError(
            f"the architecture {kind} has other log-probs in training than in inference (off by {apart:.2g}): its code "
            "draws at random or computes otherwise there, which strop does not know how to switch off",
            where=policy.where,
        )
    first, third = (
        own[: prefix_sharing.PROBE_UNCHANGED],
        own[-prefix_sharing.PROBE_LENGTHS[1] :][: prefix_sharing.PROBE_UNCHANGED],
    )
    if not prefix_sharing.mean_apart(first, third) <= tolerance:
        raise ModelError(
            f"it sees later tokens, so it is no causal language model (architecture {kind})", where=policy.where
        )
    if transform is None:
        raise ModelError(
            f"what the architecture {kind} does to its logits is neither a factor nor a soft cap of them all, so it "
            "cannot be trained here",
            where=policy.where,
        )
    return Own(own, tolerance, transform)


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """The model as inference runs it; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rounded(model: nn.Module, eps: float, seed: int, score: Any, own: Tensor) -> float:
    """How far the mean of `score` moves by roundings of its layers, drawn from a seed."""
    with rounding_noise(model, eps, seed):
        return prefix_sharing.mean_apart(score(), own)


@contextmanager
def rounding_noise(model: nn.Module, eps: float, seed: int) -> Iterator[None]:
    """Every floating point output of a layer without layers inside moves by up to eps / 2 of itself, as rounding may
    move it."""
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
    """Score one small group in every way there is; why shared rows are not right, or None.

    Raises:
        ModelError: the policy's log-probs are not those of the model's own logits, or nothing that trains moves them.
    """
    group, plain = _rows(policy)
    with policy.scoring():
        logps = policy(plain).logps
        if not prefix_sharing.mean_apart(logps, own.logps) <= own.tolerance and unfuse(policy.model):
            logps = policy(plain).logps
            if prefix_sharing.mean_apart(logps, own.logps) <= own.tolerance:
                logger.warning(
                    "%s: its layers have other results in strop's fused form than in their own, which they keep: it is "
                    "slower and takes more memory",
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
                f"shared rows gave other log-probs than plain ones (off by {apart:.2g}, where rounding may do "
                f"{own.tolerance:.2g})"
            )
    return None


def _check_gradients(policy: Policy, plain: Batch) -> None:
    with torch.enable_grad():
        reached = policy(plain).logps.requires_grad
    if not reached:
        raise ModelError(
            "its log-probs do not depend on any weight that trains, as far as gradients tell",
            where=policy.where,
            expected="adapters on layers that text flows through, in a model whose code hands gradients on",
            fix="name other layers in lora.target_modules, or train all weights (lora.enabled: false)",
        )


def _rows(policy: Policy) -> tuple[Group, Batch]:
    """The probe's group, and its plain rows."""
    tables = policy.base.get_input_embeddings(), policy.base.get_output_embeddings()  # a few have inputs of other kinds
    group = prefix_sharing.probe_group(min(table.weight.shape[0] for table in tables))
    return group, pad([group]).to(policy.device)
