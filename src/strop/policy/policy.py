"""The policy: a module whose forward takes a batch and returns the log-probs of its scored tokens. Floor 2.

Shapes: B rows, T tokens a row, M scored tokens, D width.

The base body is called, not the causal language model around it; hidden states are gathered where something is scored
and go through the tiled head of logprobs.py. Body and head meet inside `forward`, so that what wraps the module
(sharding, hooks) sees both. The module stays in train mode always: gradient checkpointing works only there, and
dropout, which is only lora_dropout, is switched by `scoring()`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from strop.batch import NOTHING, Batch, Extras, pack, pad
from strop.config.run import RunConfig
from strop.config.sections import ModelSection, TrainingSection
from strop.errors import ConfigError, ModelError
from strop.policy import sharing
from strop.policy.adapters import add_adapters, check_adapter, continue_adapters, trainable_names
from strop.policy.attention import NAME, AttentionPlan, best_kernel, register_attention
from strop.policy.casts import Casts
from strop.policy.checkpointing import checkpoint_layers
from strop.policy.denormals import flush_denormals
from strop.policy.elementwise import EAGER, Elementwise, compiled
from strop.policy.folder import place_of
from strop.policy.fused import forget_shared, fuse
from strop.policy.generation import write_generation
from strop.policy.load import LoadedModel, check_vocabulary, load_model, load_tokenizer, model_errors, quiet
from strop.policy.logits import logit_transform
from strop.policy.logprobs import token_logps
from strop.policy.matmul import widens
from strop.policy.memory import keep_few_kernels, keep_freed_memory
from strop.policy.precision import Precision, resolve_precision, short_name
from strop.policy.probe import own_logps, probe
from strop.policy.rates import bf16_gain
from strop.types import Group

logger = logging.getLogger("strop")


class Policy(nn.Module):
    """A causal language model as the engine sees it.

    Args:
        model: `loaded.module`, or the peft model around it, on its device.
        loaded: what was loaded.
        share_prefix: whether groups become shared-prefix rows (else plain padded rows).
        fp32_logits: the head's matrix products in float32 whatever the precision.
        where: how messages name the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loaded: LoadedModel,
        precision: Precision,
        *,
        share_prefix: bool,
        fp32_logits: bool = False,
        where: str = "",
    ) -> None:
        super().__init__()
        self.model = model
        self.precision, self.share_prefix, self.where = precision, share_prefix, where
        self.head_dtype = precision.of_head(fp32_logits)
        self.plain_reason: str | None = None  # why prompts are not shared, where they are not
        self.kernel: str | None = None  # of the shared rows' attention; None: the best one
        self.casts = Casts()
        self.loaded_config, self._stored = loaded.config, loaded.stored
        self.save_dtype: torch.dtype | None = None  # of a full model's files; None: as the base's
        self.plain_attention: str = loaded.module.config._attn_implementation
        self._attention = self.plain_attention
        self.transform = logit_transform(loaded.config)
        self._row_limit = sharing.rope_threshold(loaded.config)
        register_attention()
        self.train()

    @property
    def base(self) -> Any:
        """The transformers model inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def body(self) -> nn.Module:
        """What is before the head; a few of transformers' classes have it by another name than they say.

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

    def collate(
        self, groups: Sequence[Group], ref_logps: Sequence[Tensor] | None = None, extras: Extras = NOTHING
    ) -> Batch:
        """Groups to a micro-batch on the policy's device: a shared-prefix row, or plain rows."""
        return (pack if self.share_prefix else pad)(groups, ref_logps, extras).to(self.device)

    def forward(self, batch: Batch) -> Tensor:
        """[M + P] float32 (float64 on a float64 model): natural log-probs of the batch's scored tokens; with
        `collisions`, [2, M + P]: these and log(sum of p^2).

        Batches between a forward pass and its backward pass must all have one kind of rows, as `collate` makes them:
        with gradient checkpointing, layers run again under the attention of the latest batch.
        """
        try:
            with self.precision.autocast(batch.input_ids.device):
                hidden = self._hidden(batch)
        except BaseException:
            forget_shared(self.model)
            raise
        # float32 before the gather: a prompt's last token is gathered once a completion, and its gradients add up
        hidden = hidden.to(self.precision.master).flatten(0, 1).index_select(0, batch.scored_positions)
        head = self.base.get_output_embeddings()
        return token_logps(
            hidden,
            head.weight,
            getattr(head, "bias", None),
            batch.targets,
            transform=self.transform,
            compute=self.head_dtype,
            cast=self.casts,
            collisions=batch.collisions,
        )

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """No gradients and no dropout, in train mode: reference log-probs and evaluation."""
        dropouts = [m for m in self.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        before = [m.p for m in dropouts]
        try:
            for m in dropouts:
                m.p = 0.0
            with torch.no_grad(), self.casts.still():
                yield
        finally:
            for m, p in zip(dropouts, before, strict=True):
                m.p = p

    def still(self) -> AbstractContextManager[None]:
        """No weight changes inside, so that their 16-bit copies are made once: around a step's passes."""
        return self.casts.still()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that train, by the names they have in a saved folder."""
        return trainable_names(self.model)

    @property
    def attention_kernel(self) -> str:
        """What attends in shared rows."""
        return self.kernel or best_kernel(self.device, self.precision.compute)

    def describe(self) -> list[str]:
        """Lines for the terminal: sizes, dtypes, rows."""
        trained = sum(p.numel() for p in self.trainable().values())
        total = sum(p.numel() for p in self.model.parameters())
        shared = f"each prompt once, shared by its completions; attention by {self.attention_kernel}"
        plain = f"plain, padded; attention {self.plain_attention}"
        return [
            f"{total:,} weights, {trained:,} of them trained ({100 * trained / total:.2f} %)",
            self.precision.describe(self.has_adapters),
            f"rows: {shared if self.share_prefix else plain}",
        ]

    @property
    def saved_dtype(self) -> torch.dtype:
        """What a fully trained model is saved in: what was asked for, else the dtype that the base has in its files."""
        return self.save_dtype or self._stored

    @property
    def saved_bytes(self) -> int:
        """About what `save_pretrained` will take on a disk, but for the tokenizer."""
        if self.has_adapters:
            return sum(p.nbytes for p in self.trainable().values())
        return sum(p.numel() for p in self.model.parameters()) * self.saved_dtype.itemsize

    def save_pretrained(
        self, folder: Path | str, tokenizer: PreTrainedTokenizerBase, ends: Mapping[int, float] | None = None
    ) -> None:
        """Write what loads with plain peft (adapters, in float32) or transformers (a full model, in `saved_dtype`),
        generation settings, and the tokenizer with its chat template.

        Args:
            ends: the tokens that completions end with, as `trained_ends` gives them; None: nothing is known of them.

        Raises:
            ModelError: an adapter that was written is not one that peft loads.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        with quiet():
            if isinstance(self.model, PeftModel):
                self.model.save_pretrained(str(folder), save_embedding_layers=False)
                (Path(folder) / "README.md").unlink(missing_ok=True)  # a form of peft's that nobody has filled in
                check_adapter(self.model, Path(folder), self.loaded_config, self.where)
            else:
                self._save_full(Path(folder))
            own = getattr(self.base, "generation_config", None)
            write_generation(Path(folder), own, tokenizer, None if ends is None else dict(ends), self.where)

    def _save_full(self, folder: Path) -> None:
        casts: dict[int, Tensor] = {}  # by place, so that tied weights stay one tensor
        dtype = self._saving_dtype()

        def cast(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.dtype == dtype:
                return tensor
            return casts.setdefault(tensor.data_ptr(), tensor.to(dtype))

        training_config, self.base.config = self.base.config, self.loaded_config
        generation = getattr(self.base, "generation_config", None)
        if generation is not None:  # is written apart
            self.base.generation_config = GenerationConfig()
        try:
            self.base.save_pretrained(
                folder, state_dict={name: cast(tensor) for name, tensor in self.base.state_dict().items()}
            )
            self.loaded_config.dtype = short_name(dtype)
            self.loaded_config.save_pretrained(folder)
        finally:
            self.base.config = training_config
            if generation is not None:
                self.base.generation_config = generation

    def _saving_dtype(self) -> torch.dtype:
        """`saved_dtype`; float32 where a weight has become too large for float16."""
        if self.saved_dtype != torch.float16:
            return self.saved_dtype
        most = torch.finfo(torch.float16).max
        large = [n for n, p in self.base.named_parameters() if p.numel() and float(p.detach().abs().max()) > most]
        if not large:
            return torch.float16
        logger.warning("%s: saved in float32, since %s is too large for float16 by now", self.where, large[0])
        return torch.float32

    def _hidden(self, batch: Batch) -> Tensor:
        """[B, T, D] after the body's last norm."""
        shared = batch.layout is not None
        self._use_attention(NAME if shared else self.plain_attention)
        body = self.body
        if batch.layout is not None:
            plan = AttentionPlan(batch.layout, batch.input_ids.device, self.kernel)
            out = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, strop_plan=plan)
            return _last_hidden(out)
        assert batch.attention_mask is not None
        if self._row_limit is not None and batch.input_ids.shape[1] > self._row_limit:
            return self._hidden_row_by_row(body, batch.input_ids, batch.attention_mask)
        # rows are padded at the right, where a model's own positions are those of the batch
        return _last_hidden(body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False))

    def _hidden_row_by_row(self, body: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Every row in a call of its own length, since a longer one beside it would change its rotary embedding."""
        rows = []
        for ids, own in zip(input_ids, mask, strict=True):
            length = int(own.sum())
            out = body(input_ids=ids[None, :length], attention_mask=own[None, :length], use_cache=False)
            rows.append(nn.functional.pad(_last_hidden(out)[0], (0, 0, 0, len(ids) - length)))
        return torch.stack(rows)

    def _use_attention(self, name: str) -> None:
        if name != self._attention:
            self.base.set_attn_implementation(name)
            self._attention = name


def _last_hidden(out: Any) -> Tensor:
    hidden: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    return hidden


def build_policy(
    config: RunConfig, model: ModelSection, device: torch.device, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Policy:
    """The policy of one model of the configuration, as it is before the first step.

    Raises:
        ModelError, ConfigError: it cannot be built as the configuration says.
    """
    keep_few_kernels()
    if device.type == "cpu":
        flush_denormals()
    where, training = place_of(model), config.training
    precision = resolve_precision(training, device)
    if device.type == "cpu" and precision.compute == torch.bfloat16 and (gain := bf16_gain()) < 1:
        logger.warning(
            "bfloat16 takes longer than float32 on this processor, whose products are %.2g times as fast in it, and "
            "saves some memory; training.auto_precision: true chooses the faster one",
            gain,
        )
    elif device.type == "cpu" and widens(precision.compute):
        logger.warning(
            "products of %s are made in float32 and rounded on this processor, which takes longer than float32 itself "
            "and saves some memory; good to try a GPU's configuration",
            short_name(precision.compute),
        )
    adapted = config.adapts(model)
    if device.type == "cpu" and not adapted:
        keep_freed_memory()
    loaded = load_model(model, dtype=precision.compute if adapted else precision.master)
    check_vocabulary(load_tokenizer(model) if tokenizer is None else tokenizer, loaded.module, where)
    _check_length(loaded, training.max_seq_length, where)
    module: nn.Module = loaded.module
    if model.adapter is not None:
        module = continue_adapters(loaded.module, config.lora, model, master=precision.master)
    elif adapted:
        module = add_adapters(loaded.module, config.lora, model, seed=config.seed, master=precision.master)
    random = adapted and config.lora.lora_dropout > 0
    checkpoint_layers(module, training.recomputed, random=random, where=where)
    elementwise = elementwise_of(training, device)
    policy = assemble(
        module.to(device), loaded, precision, model, fp32_logits=training.fp32_logits, elementwise=elementwise
    )
    policy.save_dtype = None if training.save_dtype == "auto" else getattr(torch, training.save_dtype)
    return policy


def elementwise_of(training: TrainingSection, device: torch.device) -> Elementwise:
    """As `training.torch_compile` says.

    Raises:
        ConfigError: nothing can be compiled here.
    """
    return compiled(device) if training.torch_compile else EAGER


def assemble(
    module: nn.Module,
    loaded: LoadedModel,
    precision: Precision,
    model: ModelSection,
    *,
    fp32_logits: bool,
    elementwise: Elementwise = EAGER,
) -> Policy:
    """A policy around a model that is on its device, with the rows that are right for it, probed.

    Raises:
        ModelError: the model's own logits differ from the policy's, or it sees later tokens.
    """
    where = place_of(model)
    reason = sharing.reason_against(loaded.config, model.attn_implementation)
    if getattr(loaded.config.get_text_config(), "output_router_logits", False):
        logger.warning("%s: its auxiliary loss for the router is not part of any objective here; it is off", where)
    policy = Policy(module, loaded, precision, share_prefix=reason is None, fp32_logits=fp32_logits, where=where)
    with model_errors(where, "its forward pass"):
        own = own_logps(policy)  # before layers get other forwards than the model's
    if own.transform != policy.transform:
        logger.info("%s: its logits, measured: %s", where, own.transform.describe())
        policy.transform = own.transform
    fuse(module, policy.casts, policy.device, elementwise)
    refused = probe(policy, own)
    if refused is not None:
        logger.warning(
            "%s: prompts are not shared, so each is computed again for every further completion: %s; %s",
            where,
            refused,
            "training in float32 (bf16: false, fp16: false) may tell them apart from rounding"
            if precision.is_low
            else "the result is the same, only slower",
        )
    reason = refused or reason
    if reason is not None:
        policy.share_prefix, policy.plain_reason = False, reason
        logger.info("%s: plain padded rows, prompts are not shared: %s", where, reason)
    return policy


def _check_length(loaded: LoadedModel, max_seq_length: int, where: str) -> None:
    """Rows that are longer than the model's positions: impossible where positions are learned, said where rotary."""
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    kind = sharing.rope_by_length(loaded.config)
    threshold = sharing.rope_threshold(loaded.config)
    if kind == "dynamic" and threshold is not None and max_seq_length > threshold:
        raise ConfigError(
            f"training.max_seq_length is {max_seq_length}; with dynamic rotary scaling, rows of more than {threshold} "
            "tokens have log-probs that depend on the rows before them",
            where=where,
            fix=f"set training.max_seq_length to {threshold} or less",
        )
    if not isinstance(limit, int) or max_seq_length <= limit:
        return
    learned = [m for n, m in loaded.module.named_modules() if isinstance(m, nn.Embedding) and _is_position(n)]
    if learned:
        raise ConfigError(
            f"training.max_seq_length is {max_seq_length}, but the model has {limit} positions",
            where=where,
            fix=f"set training.max_seq_length to {limit} or less",
        )
    logger.warning("%s: max_seq_length %d is beyond the %d positions it was made for", where, max_seq_length, limit)


def _is_position(name: str) -> bool:
    return name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings")
