"""Attention over shared-prefix rows: every token sees its prompt and its own completion's tokens before it. Floor 2.

Shapes: T packed tokens, H query heads, K key-value heads (H a multiple of K), D width of a head. q is [1, H, T, D],
k and v are [1, K, T, D], masks are [queries, keys] bool, True = may be seen.

The function is registered with transformers under `NAME`, which is not in its mask interface, so that it builds no
masks of its own. The layout of the row travels as the keyword `strop_plan` through the model's call; a plan outlives
the call (gradient checkpointing binds it), and holds every mask once per batch, not once per layer.

A kernel attends with (q, k, v, plan, rules); `KERNELS` names those there are, `best_kernel` chooses. A kernel that
cannot do what a layer asks for hands on to `groups`, which can do everything. The oracle `dense` is one mask over the
whole row. Windows count positions, which restart at the prompt's length in every completion: transformers lets a query
see keys with q_pos - k_pos < window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from strop.batch import GroupSpan, to_device
from strop.errors import ModelError
from strop.policy.kernels.tiled_attention import Tile, cut_tiles, sequences, tiled_attention

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


@dataclass(frozen=True, slots=True)
class AttentionLengths:
    """The sequences of a row in the form that flash attention takes.

    queries, keys: [sequences + 1] int32, where each sequence begins among the queries and among the gathered keys.
    longest_queries, longest_keys: tokens of the longest sequence. parts: tokens of each prompt and completion of the
    row, in order. gathered: indices of the parts whose keys are joined, in order.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    parts: list[int]
    gathered: list[int]


class AttentionPlan:
    """How one row attends: its layout, the kernel that does it (None: the best for device and dtype), and what the
    kernel needs, each made when first asked for. window: None, or how many positions back a token sees, itself
    included."""

    def __init__(self, layout: tuple[GroupSpan, ...], device: torch.device, kernel: str | None = None) -> None:
        self.layout, self.device, self.kernel = layout, device, kernel
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._biases: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        self._dense: dict[int | None, Tensor] = {}
        self._tiles: dict[tuple[int | None, int, torch.dtype], tuple[Tile, ...]] = {}
        self._lengths: AttentionLengths | None = None

    def mask(self, group: int, window: int | None) -> Tensor:
        """[T, T] of one group's own tokens."""
        if (group, window) not in self._masks:
            self._masks[group, window] = group_mask(self.layout[group], self.device, window)
        return self._masks[group, window]

    def bias(self, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`mask` as scores to add, laid out as CUDA's kernels want it: of a mask, every layer would make and keep its
        own."""
        key = (group, window, dtype)
        if key not in self._biases:
            mask = self.mask(group, window)
            wide = torch.zeros(len(mask), -(-len(mask) // 16) * 16, dtype=dtype, device=self.device)
            self._biases[key] = wide[:, : len(mask)].masked_fill_(~mask, float("-inf"))
        return self._biases[key]

    def dense(self, window: int | None) -> Tensor:
        """[T, T] of the whole row."""
        if window not in self._dense:
            self._dense[window] = dense_mask(self.layout, self.device, window)
        return self._dense[window]

    def tiles(self, window: int | None, repeats: int, dtype: torch.dtype) -> tuple[Tile, ...]:
        """The row cut for matrix products. repeats: query heads of a key-value head."""
        key = (window, repeats, dtype)
        if key not in self._tiles:
            self._tiles[key] = cut_tiles(self.layout, window, repeats, dtype, self.device)
        return self._tiles[key]

    @property
    def lengths(self) -> AttentionLengths:
        """The row's sequences, for flash attention."""
        if self._lengths is None:
            found = tuple(sequences(self.layout))
            own = [s.own[1] - s.own[0] for s in found]
            seen = [n + s.prompt[1] - s.prompt[0] for n, s in zip(own, found, strict=True)]
            parts: list[int] = []
            gathered: list[int] = []
            for span in self.layout:
                first = len(parts)  # the prompt
                parts += [span.prompt, *span.completions]
                gathered += [first, first + 1]
                gathered += [i for j, n in enumerate(span.completions[1:], first + 2) if n for i in (first, j)]
            self._lengths = AttentionLengths(
                to_device(_starts(own), self.device),
                to_device(_starts(seen), self.device),
                max(own),
                max(seen),
                parts,
                gathered,
            )
        return self._lengths


def _starts(lengths: Sequence[int]) -> Tensor:
    """[n + 1] int32: where n parts of these lengths begin, and where the last ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class SoftmaxRules:
    """How a layer weighs its keys. scaling: the factor of q k. window: None, or how many positions back a token sees,
    itself included. softcap: None, or c of c tanh(score / c). sinks: None, or [H], the score of one more key per head
    whose value is 0 (gpt-oss)."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the weights are a softmax of the scaled scores."""
        return self.softcap is None and self.sinks is None


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


Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, SoftmaxRules], Tensor]


def by_dense_mask(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rules: SoftmaxRules) -> Tensor:
    """The oracle: one mask over the whole row. Most of it is wasted, since groups do not see each other."""
    return _attend(q, k, v, plan.dense(rules.window), rules)


def by_groups(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rules: SoftmaxRules) -> Tensor:
    """One call per group, so that the work grows with the sum of the squares of the groups' lengths."""
    sizes = [span.stop - span.start for span in plan.layout]
    # split, not slices: its backward pass is one cat, and theirs a whole row of zeros each
    groups = zip(*(torch.split(x, sizes, dim=2) for x in (q, k, v)), strict=True)
    added = q.device.type == "cuda" and rules.is_plain
    parts = []
    for i, (own_q, own_k, own_v) in enumerate(groups):
        mask = plan.bias(i, rules.window, q.dtype) if added else plan.mask(i, rules.window)
        parts.append(_attend(own_q, own_k, own_v, mask, rules))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def by_tiles(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rules: SoftmaxRules) -> Tensor:
    """Matrix products over tiles of queries (tiled_attention.py); scores without a cap or sinks."""
    if not rules.is_plain:
        return by_groups(q, k, v, plan, rules)
    tiles = plan.tiles(rules.window, q.shape[1] // k.shape[1], q.dtype)
    return tiled_attention(q, k, v, tiles, rules.scaling)


def by_flash(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rules: SoftmaxRules) -> Tensor:
    """Flash attention over sequences of unlike length, on CUDA in 16 bits: the keys of each prompt are copied before
    those of every completion but the first, which lie after it anyway."""
    if not rules.is_plain or not _flash_takes(q, v):
        return by_groups(q, k, v, plan, rules)
    lengths = plan.lengths
    # split and cat, whose backward pass is a cat and sums of parts; an index would add row by row, slices whole rows
    cut = (torch.split(x[0].transpose(0, 1), lengths.parts) for x in (k, v))
    keys, values = (torch.cat([parts[i] for i in lengths.gathered]) for parts in cut)
    out = varlen_attn(
        q[0].transpose(0, 1),
        keys,
        values,
        lengths.queries,
        lengths.keys,
        lengths.longest_queries,
        lengths.longest_keys,
        scale=rules.scaling,
        window_size=(-1 if rules.window is None else rules.window - 1, 0),  # queries stand at the end of their keys
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _flash_takes(q: Tensor, v: Tensor) -> bool:
    width = q.shape[-1]
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and width == v.shape[-1]
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to attend. devices: the types of those that it is for. copies_prompts: whether it copies the keys and
    values of a prompt for each completion but the first, which takes memory."""

    attend: Attend
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    copies_prompts: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rules: SoftmaxRules) -> Tensor:
        return self.attend(q, k, v, plan, rules)


KERNELS: Mapping[str, Kernel] = {
    "groups": Kernel(by_groups),
    "dense": Kernel(by_dense_mask),
    "tiles": Kernel(by_tiles, frozenset({"cpu"})),
    "flash": Kernel(by_flash, frozenset({"cuda"}), copies_prompts=True),
}


def best_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the fastest kernel that is right here."""
    if device.type == "cuda":
        return "flash" if dtype in (torch.bfloat16, torch.float16) else "groups"
    return "tiles"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rules: SoftmaxRules) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    if rules.is_plain:
        grouped = repeats > 1 and q.device.type == "cpu"
        if repeats > 1 and not grouped:  # on CUDA, a mask and enable_gqa together leave only the slowest kernel
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rules.scaling, enable_gqa=grouped)
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * rules.scaling
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    stats = torch.promote_types(scores.dtype, torch.float32)
    if rules.sinks is not None:
        sinks = rules.sinks.to(stats).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return F.softmax(torch.cat([scores.to(stats), sinks], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v
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
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    strop_plan: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer. query: [1, H, T, D]; s_aux: sinks [H]; returns [1, T, H, D].

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
    kernel = KERNELS[strop_plan.kernel or best_kernel(query.device, value.dtype)]
    rules = SoftmaxRules(scaling, sliding_window, softcap, s_aux)
    out = kernel(*_in_one_dtype(query, key, value), strop_plan, rules)
    return out.transpose(1, 2).contiguous(), None


def _in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast has it for torch's own attention: norms of queries and keys may have left them in float32."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def register_attention() -> None:
    """Make `NAME` known to transformers; any number of times."""
    AttentionInterface.register(NAME, shared_prefix_attention)
