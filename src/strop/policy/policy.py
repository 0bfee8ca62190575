"""The policy: a module that takes a batch and returns the log-probs of its scored tokens, or rewards. Floor 2.

Shapes: B rows, T tokens per row, M scored tokens, D width.

`forward` calls the body of the model, gathers hidden states at the scored positions only, and passes them through the
tiled head of logprobs.py; a reward model's head, one linear layer, makes a reward of them. Body and head are both
called inside `forward`, so that code which wraps the module (sharding, hooks) sees both. The module always stays in
train mode, because gradient checkpointing works only there; dropout (only lora_dropout is active) is switched off by
`scoring()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from strop.batch import PROMPT_LOGPS, Batch, TokenScores, pack, pad
from strop.columns import NO_COLUMNS, Columns
from strop.errors import ModelError
from strop.policy import prefix_sharing
from strop.policy.kernels.attention import NAME, AttentionPlan, best_kernel, register_attention
from strop.policy.kernels.entropy import ENTROPIES, token_entropies
from strop.policy.kernels.fused import forget_shared
from strop.policy.kernels.logprobs import COLLISIONS, token_logps
from strop.policy.kernels.weight_copies import WeightCopies
from strop.policy.model.adapter_init import Initial
from strop.policy.model.adapters import trainable_names
from strop.policy.model.load import LoadedModel
from strop.policy.model.logit_transform import logit_transform
from strop.policy.model.quantised_base import total_weights
from strop.policy.model.task import head_of, is_reward_model
from strop.policy.precision import Precision
from strop.policy.saving import help_to_save, save, save_adapter
from strop.policy.strategy import Replicated, Strategy
from strop.policy.teacher import DIVERGENCE, TEACHER_LOGPS, Teacher
from strop.types import Group
from strop.world import World

T = TypeVar("T")


class Policy(nn.Module):
    """A causal language model, or a reward model, as the engine sees it.

    Args:
        model: `loaded.module`, or the peft model around it, on its device. Its weights that train require gradients.
        loaded: the model as it was loaded.
        share_prefix: whether groups become shared-prefix rows, not plain padded rows.
        fp32_logits: compute the products of the head in float32, whatever the precision.
        where: how messages name the model.
        weights_hash: `model_hashes.weights_hash` of what was loaded, if it was asked for.
    """

    SUPPLIES: ClassVar[frozenset[str]] = frozenset({PROMPT_LOGPS, COLLISIONS, ENTROPIES, DIVERGENCE, TEACHER_LOGPS})
    """Columns that the policy can compute in the same pass as the log-probs, if a batch wants them."""

    def __init__(
        self,
        model: nn.Module,
        loaded: LoadedModel,
        precision: Precision,
        *,
        share_prefix: bool,
        fp32_logits: bool = False,
        where: str = "",
        weights_hash: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._trained = trainable_names(model)
        self._weights_hash = weights_hash
        self.precision, self.share_prefix, self.where = precision, share_prefix, where
        self.head_dtype = precision.of_head(fp32_logits)
        self.plain_reason: str | None = None  # why prompts are not shared, where they are not
        self.kernel: str | None = None  # of the shared rows' attention; None: the best one
        self.weight_copies = WeightCopies()
        self.loaded_config, self._stored = loaded.config, loaded.stored
        self.save_dtype: torch.dtype | None = None  # of a full model's files; None: as the base's
        self.initial_adapter: Initial | None = None  # what the base lost to adapters when they were made
        self.plain_attention: str = loaded.module.config._attn_implementation
        self._attention = self.plain_attention
        self.transform = logit_transform(loaded.config)
        self.is_reward_model = is_reward_model(loaded.module)
        self.teacher: Teacher | None = None
        self.has_new_head = False  # of a reward model: its weights have been drawn, not trained
        self._row_limit = prefix_sharing.rope_threshold(loaded.config)
        self.strategy: Strategy = Replicated(self, World.alone(self.device))
        register_attention()
        self.train()

    @property
    def base(self) -> Any:
        """The transformers model inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def body(self) -> nn.Module:
        """The model without its head. A few classes of transformers keep it under another name than they declare.

        Raises:
            ModelError: it is not found.
        """
        for name in (self.base.base_model_prefix, "model"):
            if isinstance(found := getattr(self.base, name, None), nn.Module):
                return found
        raise ModelError(
            f"{type(self.base).__name__} has no {self.base.base_model_prefix}, which its class says it has",
            where=self.where,
            expected="a causal language model: a body and a linear head",
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.model, PeftModel)

    def collate(self, groups: Sequence[Group], columns: Columns = NO_COLUMNS, wants: Iterable[str] = ()) -> Batch:
        """Makes a micro-batch on the policy's device: a shared-prefix row, or plain rows. The arguments are those of
        `batch.pack`; `wants` must be among `SUPPLIES`."""
        return (pack if self.share_prefix else pad)(groups, columns, wants).to(self.device)

    def forward(self, batch: Batch) -> TokenScores:
        """Natural log-probs of the batch's scored tokens, in float32 (float64 on a float64 model), and the columns that
        the batch wants. A reward model gives rewards in place of log-probs, each read at the token before a scored one.

        Between a forward pass and its backward pass, all batches must have the same row layout, as `collate` makes
        them: with gradient checkpointing, layers are recomputed with the attention of the latest batch.
        """
        try:
            with self.precision.autocast(batch.input_ids.device):
                hidden = self.hidden_states(batch)
        except BaseException:
            forget_shared(self.model)
            raise
        # to float32 before gathering: a prompt's last token is gathered once per completion, and the gradients of
        # these copies are added up, which must not happen in 16 bits
        hidden = hidden.to(self.precision.master).flatten(0, 1).index_select(0, batch.scored_positions)
        head = head_of(self.base)
        if self.is_reward_model:
            return batch.token_scores(head(hidden).squeeze(-1))
        if DIVERGENCE in batch.wants:
            assert self.teacher is not None
            return self.teacher.compared(self, batch, hidden)
        scored = token_logps(
            hidden,
            head.weight,
            getattr(head, "bias", None),
            batch.targets,
            transform=self.transform,
            compute=self.head_dtype,
            cast=self.weight_copies,
            collisions=COLLISIONS in batch.wants,
        )
        columns: dict[str, Tensor] = {}
        if COLLISIONS in batch.wants:
            scored, columns[COLLISIONS] = scored
        if ENTROPIES in batch.wants:
            columns[ENTROPIES] = self._entropies(hidden[: batch.structure.num_tokens])
        if TEACHER_LOGPS in batch.wants:
            assert self.teacher is not None
            columns[TEACHER_LOGPS] = self.teacher.logps(batch)
        return batch.token_scores(scored, **columns)

    def _entropies(self, hidden: Tensor) -> Tensor:
        """[M] of the distributions after these hidden states, with gradients."""
        head = head_of(self.base)
        return token_entropies(
            hidden,
            head.weight,
            getattr(head, "bias", None),
            transform=self.transform,
            compute=self.head_dtype,
            cast=self.weight_copies,
        )

    def own_pass(self, compute: Callable[[], T]) -> T:
        """The result of `compute`, which may call the model's own forward: its weights are whole meanwhile."""
        return compute()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A block without gradients and dropout, for the reference and evaluations; the module stays in train mode."""
        dropouts = [m for m in self.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        before = [m.p for m in dropouts]
        try:
            for m in dropouts:
                m.p = 0.0
            with torch.no_grad(), self.weight_copies.weights_fixed():
                yield
        finally:
            for m, p in zip(dropouts, before, strict=True):
                m.p = p

    @contextmanager
    def generating(self) -> Iterator[None]:
        """No gradients, no dropout, all weights whole, and the model's own attention, so that it can decode with a
        cache; each module is then in the mode that it was in. All processes enter and leave it together."""
        training = [(m, m.training) for m in self.modules()]
        with self.scoring(), self.strategy.all_gathered():
            self._use_attention(self.plain_attention)
            self.eval()
            try:
                yield
            finally:
                for m, was in training:
                    m.training = was

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] after the body -> [R, V] what the softmax is taken of, in float32 at least; without gradients."""
        head, dtype = self.base.get_output_embeddings(), self.head_dtype
        bias = getattr(head, "bias", None)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            products = nn.functional.linear(hidden.to(dtype), self.weight_copies(head.weight, dtype))
            logits = products.to(self.precision.master)
            return self.transform(logits if bias is None else logits + bias)

    def weights_fixed(self) -> AbstractContextManager[None]:
        """A block in which no weight changes, so that 16-bit copies of weights are made once: the passes of a step."""
        return self.weight_copies.weights_fixed()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that train, by the names under which they are saved."""
        return {saved: self.model.get_parameter(name) for saved, name in self._trained.items()}

    def trainable_in_module(self) -> dict[str, nn.Parameter]:
        """The weights that train, by their names in `model`."""
        return {name: self.model.get_parameter(name) for name in self._trained.values()}

    @property
    def weights_hash(self) -> str:
        """A hash of all weights as they were loaded, including adapters."""
        assert self._weights_hash is not None, "only a policy that was built with `hashed` has a hash"
        return self._weights_hash

    @property
    def attention_kernel(self) -> str:
        """Name of the kernel that computes attention in shared-prefix rows."""
        return self.kernel or best_kernel(self.device, self.precision.compute)

    def describe(self) -> list[str]:
        """Lines of text: number of weights, dtypes, row layout."""
        trained = sum(p.numel() for p in self.trainable().values())
        total = total_weights(self.model)
        shared = f"each prompt once, shared by its completions; attention by {self.attention_kernel}"
        plain = f"plain, padded; attention {self.plain_attention}"
        placed = self.strategy.describe()
        return [
            f"{total:,} weights, {trained:,} of them trained ({100 * trained / total:.2f} %)",
            self.precision.describe(self.has_adapters),
            f"rows: {shared if self.share_prefix else plain}",
            *([] if placed is None else [f"weights: {placed}"]),
        ]

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype of a saved full model: what was asked for, or else the dtype that the base has in its files."""
        return self.save_dtype or self._stored

    @property
    def saved_bytes(self) -> int:
        """Approximate bytes that `save_pretrained` will write, without the tokenizer."""
        if self.has_adapters:
            beside = sum(tensor.nbytes for tensor in (self.initial_adapter or {}).values())
            return sum(p.nbytes for p in self.trainable().values()) + beside
        return sum(p.numel() for p in self.model.parameters()) * self.saved_dtype.itemsize

    def save_pretrained(
        self, folder: Path | str, tokenizer: PreTrainedTokenizerBase, ends: Mapping[int, float] | None = None
    ) -> None:
        """Writes a folder that loads with plain peft (adapters, in float32) or transformers (a full model, in
        `saved_dtype`), with generation settings, the tokenizer and its chat template.

        Args:
            ends: the tokens that completions end with, as `trained_ends` returns them; None: they are not known.

        Raises:
            ModelError: peft cannot load the adapter that was written.
        """
        save(self, Path(folder), tokenizer, ends)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter alone, in float32, into a folder that plain peft loads; for a policy that has one.

        Raises:
            ModelError: peft cannot load the adapter that was written.
        """
        save_adapter(self, folder)

    def help_to_save(self) -> None:
        """What the other processes do while rank 0 calls `save_pretrained`: they give it their parts of the weights."""
        help_to_save(self)

    def hidden_states(self, batch: Batch) -> Tensor:
        """[B, T, D] the output of the body, after its last norm."""
        shared = batch.layout is not None
        self._use_attention(NAME if shared else self.plain_attention)
        body = self.body
        if batch.layout is not None:
            plan = AttentionPlan(batch.layout, batch.input_ids.device, self.kernel)
            out = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, strop_plan=plan)
            return _last_hidden(out)
        assert batch.attention_mask is not None
        if self._row_limit is not None and batch.input_ids.shape[1] > self._row_limit:
            return self._hidden_row_by_row(body, batch)
        # rows are padded on the right, so the positions that the model counts itself are those of the batch
        return _last_hidden(body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False))

    def _hidden_row_by_row(self, body: nn.Module, batch: Batch) -> Tensor:
        """Calls the body once per row, because a longer row in the same batch would change its rotary embedding."""
        assert batch.attention_mask is not None
        rows = []
        for ids, mask, length in zip(batch.input_ids, batch.attention_mask, batch.row_lengths, strict=True):
            out = body(input_ids=ids[None, :length], attention_mask=mask[None, :length], use_cache=False)
            rows.append(nn.functional.pad(_last_hidden(out)[0], (0, 0, 0, len(ids) - length)))
        return torch.stack(rows)

    def _use_attention(self, name: str) -> None:
        if name != self._attention:
            self.base.set_attn_implementation(name)
            self._attention = name


def _last_hidden(out: Any) -> Tensor:
    hidden: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    return hidden
