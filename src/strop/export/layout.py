"""Names and order of weights: of transformers' folders, and of `consolidated.NN.pth` as Meta publishes Llama. Floor 6.

The consolidated layout turns pairs of neighbours in a head (0 with 1, 2 with 3, ...), transformers' turns its first
half with its second. So rows of queries and keys change places on the way, with their biases and norms; nothing is
computed, and there and back is the same to the bit. Names beyond Meta's (biases, norms of queries and keys) follow the
same scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from strop.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
"""By `model_type`."""
HEAD, EMBEDDING = "output.weight", "tok_embeddings.weight"
DERIVED = ("rope.freqs", "inv_freq")
"""Ends of names of tables that follow from the configuration: left out."""

_WHOLE = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": "norm.weight", "lm_head.weight": HEAD}
_PARTS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
_NORMS_BEHIND = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "ffn_norm"}
"""OLMo 2 norms what attention and feed-forward give, not what they read."""
ACROSS = ("attention.wo.weight", "feed_forward.w2.weight")
"""Ends of names of weights that several consolidated files have side by side in their columns; the others in rows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One model's. family: one of `FAMILIES`. heads, key_heads: of queries, of keys. head_dim: of each."""

    family: str
    heads: int
    key_heads: int
    head_dim: int

    def _parts(self) -> Mapping[str, str]:
        return _PARTS | (_NORMS_BEHIND if self.family == "olmo2" else _NORMS)

    def consolidated_name(self, name: str) -> str:
        """Of a tensor of transformers'.

        Raises:
            ModelError: these models have none of this name.
        """
        if name in _WHOLE:
            return _WHOLE[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match and match[2] in self._parts():
            return f"layers.{match[1]}.{self._parts()[match[2]]}.{match[3]}"
        raise _unknown(name, self.family)

    def transformers_name(self, name: str) -> str:
        """Of a tensor of a consolidated file.

        Raises:
            ModelError: these models have none of this name.
        """
        whole = {theirs: ours for ours, theirs in _WHOLE.items()}
        parts = {theirs: ours for ours, theirs in self._parts().items()}
        if name in whole:
            return whole[name]
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match and match[2] in parts:
            return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"
        raise _unknown(name, self.family)

    def to_consolidated(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the consolidated order. name: the consolidated one."""
        heads = self._turned_heads(name, tensor)
        if heads is None:
            return tensor
        rest = tensor.shape[1:]
        return tensor.reshape(heads, 2, self.head_dim // 2, *rest).transpose(1, 2).reshape(tensor.shape)

    def to_transformers(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in transformers' order. name: the consolidated one."""
        heads = self._turned_heads(name, tensor)
        if heads is None:
            return tensor
        rest = tensor.shape[1:]
        return tensor.reshape(heads, self.head_dim // 2, 2, *rest).transpose(1, 2).reshape(tensor.shape)

    def _turned_heads(self, name: str, tensor: Tensor) -> int | None:
        """How many heads lie in the rows of a tensor that positions turn; None: they do not."""
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part not in ("wq", "wk", "q_norm", "k_norm"):
            return None
        expected = self.heads if part[0] == "q" or part == "wq" else self.key_heads
        heads = tensor.shape[0] // self.head_dim
        if tensor.shape[0] % self.head_dim or heads not in (expected, 1):  # one norm may serve all heads
            raise ModelError(
                f"{name} has {tensor.shape[0]} rows",
                expected=f"{expected} heads of {self.head_dim}, as the configuration says",
                fix="use the configuration and the weights of one and the same model",
            )
        return heads


def _unknown(name: str, family: str) -> ModelError:
    return ModelError(
        f"there is a tensor {name}, which models of the family {family} do not have",
        expected=f"a model of {', '.join(FAMILIES)} as its authors publish it",
        fix="convert the model it was made from; an adapter is merged first (strop merge)",
    )
