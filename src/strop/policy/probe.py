"""What a loaded model is asked before it trains: whether strop's way of scoring it gives its own log-probs. Floor 2.

The probe is one small group of random tokens (sharing.py). The model scores it by its own code, before any layer gets
another forward; then the policy does as plain rows and, where prompts may be shared, as a shared row.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from strop.batch import Batch, pack, pad
from strop.errors import ModelError
from strop.policy import sharing
from strop.policy.fused import unfuse
from strop.types import Group

if TYPE_CHECKING:
    from strop.policy.policy import Policy

logger = logging.getLogger("strop")


def own_logps(policy: Policy) -> tuple[Tensor, float]:
    """Log-probs of the probe from the model's own logits, and how far from them rounding may lead.

    Raises:
        ModelError: it has no linear head, or sees later tokens.
    """
    head, kind = policy.base.get_output_embeddings(), policy.base.config.model_type
    if head is None or getattr(head, "weight", torch.empty(0)).ndim != 2:
        raise ModelError(
            f"the architecture {kind} has no linear head, so it cannot be trained here", where=policy.where
        )
    _, plain = _rows(policy)
    with policy.scoring(), policy.precision.autocast(policy.device):
        out = policy.model(input_ids=plain.input_ids, attention_mask=plain.attention_mask, use_cache=False)
    logits = out.logits.to(policy.precision.master).flatten(0, 1)[plain.scored_positions]
    own = logits.log_softmax(-1).gather(1, plain.targets[:, None]).squeeze(1)
    tolerance = sharing.logit_tolerance(policy.precision.compute, float(logits.abs().max()))
    first, third = own[: sharing.PROBE_UNCHANGED], own[-sharing.PROBE_LENGTHS[1] :][: sharing.PROBE_UNCHANGED]
    if not sharing.furthest(first, third) <= tolerance:
        raise ModelError(
            f"it sees later tokens, so it is no causal language model (architecture {kind})", where=policy.where
        )
    return own, tolerance


def probe(policy: Policy, own: Tensor, tolerance: float) -> str | None:
    """Score one small group in every way there is; why shared rows are not right, or None. own, tolerance: of
    `own_logps`.

    Raises:
        ModelError: the policy's log-probs are not those of the model's own logits.
    """
    group, plain = _rows(policy)
    with policy.scoring():
        logps = policy(plain)
        if not sharing.furthest(logps, own) <= tolerance and unfuse(policy.model):
            logps = policy(plain)
            if sharing.furthest(logps, own) <= tolerance:
                logger.warning(
                    "%s: its layers have other results in strop's fused form than in their own, which they keep: it is "
                    "slower and takes more memory",
                    policy.where,
                )
        if not (apart := sharing.furthest(logps, own)) <= tolerance:
            raise ModelError(
                f"its log-probs are not those of a linear head over its hidden states (off by {apart:.2g}), "
                f"so the architecture {policy.base.config.model_type} cannot be trained here",
                where=policy.where,
            )
        if not policy.share_prefix:
            return None
        alone = torch.cat([policy(pad([_alone(group, i)]).to(policy.device)) for i in range(len(group.completions))])
        apart = sharing.furthest(policy(pack([group]).to(policy.device)), logps)
        if not apart <= sharing.sharing_tolerance(policy.precision.compute, sharing.furthest(alone, logps)):
            return f"shared rows gave other log-probs than plain ones (off by {apart:.2g})"
    return None


def _rows(policy: Policy) -> tuple[Group, Batch]:
    """The probe's group, and its plain rows."""
    group = sharing.probe_group(policy.base.get_input_embeddings().weight.shape[0])
    return group, pad([group]).to(policy.device)


def _alone(group: Group, index: int) -> Group:
    return Group(group.prompt_ids, (group.completions[index],), group.origin)
