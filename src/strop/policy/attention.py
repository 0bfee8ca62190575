"""Attention over shared-prefix rows: every token sees its prompt and its own completion's tokens before it. Floor 2.

Shapes: T packed tokens, H query heads, K key-value heads (H a multiple of K), D width of a head. q is [1, H, T, D],
k and v are [1, K, T, D], masks are [queries, keys] bool, True = may be seen.

The function is registered with transformers under `NAME`, which is not in its mask interface, so that it builds no
masks of its own. The layout of the row travels as the keyword `strop_plan` through the model's call; a plan outlives
the call (gradient checkpointing binds it), and holds every mask once a batch, not once a layer.

A kernel is a function of (q, k, v, plan, scaling, window, softcap); `KERNELS` names those there are. The oracle
`whole_row` is one dense mask over the whole row. Windows count positions, which restart at the prompt's length in every
completion: transformers lets a query see keys with q_pos - k_pos < window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from strop.batch import GroupSpan
from strop.errors import ModelError

NAME = "strop_shared_prefix"

# keywords that models hand on to attention functions and that change nothing about which tokens see which
_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)


class AttentionPlan:
    """How one row attends: its layout, the kernel that does it, and the masks it needs, each made when first asked
    for. window: None, or how many positions back a token sees, itself included."""

    def __init__(self, layout: tuple[GroupSpan, ...], device: torch.device, kernel: str = "groups") -> None:
        self.layout, self.device, self.kernel = layout, device, KERNELS[kernel]
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._dense: dict[int | None, Tensor] = {}

    def mask(self, group: int, window: int | None) -> Tensor:
        """[T, T] of one group's own tokens."""
        if (group, window) not in self._masks:
            self._masks[group, window] = group_mask(self.layout[group], self.device, window)
        return self._masks[group, window]

    def dense(self, window: int | None) -> Tensor:
        """[T, T] of the whole row."""
        if window not in self._dense:
            self._dense[window] = dense_mask(self.layout, self.device, window)
        return self._dense[window]


def group_mask(span: GroupSpan, device: torch.device, window: int | None = None) -> Tensor:
    """[T, T] bool: what each token of a group sees of the group."""
    lengths = torch.tensor([span.prompt, *span.completions], device=device)
    part = torch.repeat_interleave(lengths)  # 0: prompt, i: completion i
    starts = torch.zeros_like(lengths)
    starts[1:] = span.prompt
    offsets = torch.arange(len(part), device=device) - (lengths.cumsum(0) - lengths)[part]
    positions = starts[part] + offsets
    seen = (part[None] == part[:, None]) | (part[None] == 0)
    distance = positions[:, None] - positions[None]
    seen &= distance >= 0
    return seen if window is None else seen & (distance < window)


def dense_mask(layout: tuple[GroupSpan, ...], device: torch.device, window: int | None = None) -> Tensor:
    """[T, T] bool: the oracle, what each token of a row sees of the whole row."""
    mask = torch.zeros(layout[-1].stop, layout[-1].stop, dtype=torch.bool, device=device)
    for span in layout:
        mask[span.start : span.stop, span.start : span.stop] = group_mask(span, device, window)
    return mask


Kernel = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float, int | None, float | None], Tensor]


def whole_row(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """The oracle: one dense mask, groups x groups of it wasted."""
    return _attend(q, k, v, plan.dense(window), scaling, softcap)


def by_group(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One call a group, so that the work grows with the sum of the groups' squares."""
    parts = []
    for i, span in enumerate(plan.layout):
        own = slice(span.start, span.stop)
        parts.append(_attend(q[:, :, own], k[:, :, own], v[:, :, own], plan.mask(i, window), scaling, softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


KERNELS: Mapping[str, Kernel] = {"groups": by_group, "dense": whole_row}


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    if softcap is None:
        grouped = repeats > 1 and q.device.type == "cpu"
        if repeats > 1 and not grouped:  # on CUDA, a mask and enable_gqa together leave only the slowest kernel
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    stats = torch.promote_types(scores.dtype, torch.float32)
    return F.softmax(scores, dim=-1, dtype=stats).to(v.dtype) @ v


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    strop_plan: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer. query: [1, H, T, D]; returns [1, T, H, D].

    Raises:
        ModelError: the layer asks for something that this attention does not do.
    """
    assert strop_plan is not None and attention_mask is None and dropout == 0.0
    unknown = sorted(k for k, v in others.items() if k not in _HARMLESS and v is not None and v is not False)
    if unknown or is_causal is False:
        raise ModelError(
            f"its attention layers use {', '.join(unknown) or 'is_causal=False'}, "
            "which shared-prefix attention does not know",
            fix="set models[].attn_implementation, for instance to eager",
        )
    if scaling is None:
        scaling = float(query.shape[-1]) ** -0.5
    out = strop_plan.kernel(query, key, value, strop_plan, scaling, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make `NAME` known to transformers; any number of times."""
    AttentionInterface.register(NAME, shared_prefix_attention)
