"""A reward model: any sequence-classification model with one label, which scores conversations. Floor 4.

It stays in this process, beside the policy and on its device. Rows are padded with a token that none of them has, so
that the model, which looks for the last token before the padding, finds the right one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from strop.data.text.message_forms import Tools, forms_of
from strop.errors import ConfigError, DataError, TrainingError, foreign_errors
from strop.policy.memory_attempts import attempt
from strop.policy.model.adapter_base import saved_model
from strop.policy.model.adapters import with_adapter
from strop.policy.model.configuration import quiet
from strop.policy.model.folder import source_of
from strop.policy.model.load import load_model, model_errors
from strop.policy.model.tokenizer import read_tokenizer
from strop.rewards.lookup import MODEL_PREFIX

BATCH_TOKENS = 16_384
"""Tokens, padding counted, that are scored at once."""

Chat = Sequence[Mapping[str, Any]]


class RewardModel:
    """Scores conversations by a model's one logit.

    Args:
        name: a folder or hub id of a model or an adapter, or a run folder.

    Raises:
        ModelError: it cannot be loaded. ConfigError: it is a language model, or has another number of labels, or no
            chat template.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._where = f"rewards: {MODEL_PREFIX}{name}"
        section = saved_model(name)
        self._tokenizer = read_tokenizer(section)
        if not self._tokenizer.chat_template:
            raise ConfigError("the reward model's tokenizer has no chat template", where=self._where)
        model: Any
        if section.adapter is not None:
            model = with_adapter(load_model(section, dtype=dtype, reward_model=True).module, section)
        else:
            model = self._whole(source_of(section.huggingface_id), dtype)
        self._model = model.to(device).eval().requires_grad_(False)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._limit = limit if isinstance(limit, int) else None

    def _whole(self, source: str, dtype: torch.dtype) -> Any:
        with model_errors(source, "loading it as a reward model"), quiet():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        if missing := sorted(found["missing_keys"]):
            raise ConfigError(
                f"it has no weights of {', '.join(missing[:3])}, as a language model has none",
                where=self._where,
                expected="a reward model: a sequence-classification model with one label",
                fix="name a reward model, or train one (method: reward)",
            )
        if model.config.num_labels != 1:
            raise ConfigError(
                f"it has {model.config.num_labels} labels",
                where=self._where,
                expected="a reward model: a sequence-classification model with one label",
            )
        return model

    def values(self, chats: Sequence[Chat], tools: Tools = None) -> tuple[list[float | None], str]:
        """The reward of each conversation, None where it is longer than the model takes or the logit is not finite; and
        what is wrong with these, in words.

        tools: the schemas of those that the conversations had.

        Raises:
            DataError: its chat template refuses a conversation. TrainingError: memory does not suffice for one.
        """
        ids = [self._ids(chat, tools) for chat in chats]
        found: list[float | None] = [None] * len(ids)
        fitting = [i for i, row in enumerate(ids) if self._limit is None or len(row) <= self._limit]
        for batch in _batches(fitting, [len(row) for row in ids]):
            for i, value in zip(batch, self._scored([ids[i] for i in batch]), strict=True):
                found[i] = value if math.isfinite(value) else None
        too_long = len(ids) - len(fitting)
        why = f"{too_long} conversations have more than {self._limit} tokens" if too_long else ""
        return found, why

    def _ids(self, chat: Chat, tools: Tools) -> list[int]:
        form = forms_of(chat, tools)[0]  # as inference servers hand them to templates
        messages, schemas = list(form.of(chat)), form.of_tools(tools)
        with foreign_errors(
            lambda why: DataError(f"its chat template refuses a conversation: {why}", where=self._where)
        ):
            return list(self._tokenizer.apply_chat_template(messages, tools=schemas, return_dict=False))

    def _scored(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The rewards of rows that are scored together or, if memory does not suffice, one half after the other."""
        found, why = attempt(lambda: self._logits(rows))
        if found is not None:
            return found
        if len(rows) == 1:
            raise TrainingError(
                f"memory ran out where a conversation of {len(rows[0]):,} tokens is rewarded: {why}",
                where=self._where,
                fix="lower training.max_seq_length, or name a smaller reward model",
            )
        middle = len(rows) // 2
        return self._scored(rows[:middle]) + self._scored(rows[middle:])

    @torch.no_grad()
    def _logits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        used, width = {token for row in rows for token in row}, max(map(len, rows))
        pad = next(token for token in range(len(used) + 1) if token not in used)
        self._model.config.pad_token_id = self._model.config.get_text_config().pad_token_id = pad
        device = self._model.device
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        values: list[float] = logits[:, 0].double().tolist()
        return values


def _batches(which: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of like length together, the longest first."""
    batch: list[int] = []
    for i in sorted(which, key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
