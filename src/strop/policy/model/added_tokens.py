"""New tokens (`models[].add_tokens`): into the tokenizer, and rows for them into the embedding and the head. Floor 2.

They are plain added tokens, not special ones: rows may hold their text, and it stays when answers become text again.
(The text of a special token in a row is a text like any other, so that no row can forge the end of a turn.) A new row
begins as the mean of the rows of the tokens before it, in the embedding as in the head. All new rows are then alike, as
those that transformers' resize_token_embeddings makes are but for a little noise, and nothing has to be drawn.

Adapters train the new rows alone, as peft's trainable tokens: each replaces its row, so that a saved adapter does not
depend on what the row began with. In full training, all rows train.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from strop.errors import ModelError
from strop.policy.model.configuration import quiet
from strop.policy.model.task import head_of, is_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("strop")

ROWS_AT_ONCE = 8192
_TABLE = re.compile(r"\b(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)\.(modules_to_save\.)?weight$")
"""Names in an adapter's file of embeddings and heads that were trained in full."""


def add_to_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], where: str, *, tell: bool = True
) -> tuple[int, ...]:
    """Add tokens to a tokenizer, in place.

    Args:
        tell: log which of them are tokens already.

    Returns:
        The ids of those that are new.
    """
    known = tokenizer.get_vocab()
    new = [text for text in texts if text not in known]
    if tell and len(new) < len(texts):
        told = ", ".join(f"{text} ({known[text]})" for text in texts if text in known)
        logger.warning("%s: models[].add_tokens: already tokens, which stay as they are: %s", where, told)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in new])
    ids = tuple(int(tokenizer.convert_tokens_to_ids(text)) for text in new)
    if tell and ids:
        shown = ", ".join(f"{text} ({i})" for text, i in list(zip(new, ids, strict=True))[:8])
        logger.info("%s: %d new tokens: %s%s", where, len(ids), shown, ", ..." if len(ids) > 8 else "")
    return ids


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a model needs beside what its files hold. ids: of tokens that train as new ones. num_rows: of the embedding,
    at least."""

    ids: tuple[int, ...] = ()
    num_rows: int = 0


def of_adapter(settings: Mapping[str, Any], weights: Path) -> NewTokens:
    """What the base of an adapter needs that was trained with new tokens: a row for each that it holds one of.

    Args:
        settings: its adapter_config.json. weights: its file.
    """
    found = settings.get("trainable_token_indices") or ()
    parts = found.values() if isinstance(found, Mapping) else [found]
    listed = [i for part in parts if isinstance(part, list | tuple) for i in part if isinstance(i, int)]
    rows = [1 + i for i in listed]
    with suppress(SafetensorError), safe_open(weights, framework="pt") as tensors:  # loading it says what is wrong
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            if _TABLE.search(name):
                rows.append(tensors.get_slice(name).get_shape()[0])
    return NewTokens(num_rows=max(rows, default=0))


def add_rows(module: PreTrainedModel, config: PreTrainedConfig, new: NewTokens, where: str) -> None:
    """Give the embedding and the head the rows that new tokens need; `module` and `config` are changed in place. New
    tokens that have a row already, since a vocabulary was padded, get the mean in its place.

    Args:
        config: the configuration that is saved with the model, beside that of `module`.

    Raises:
        ModelError: the model has further tables by token, which transformers does not enlarge.
    """
    num_rows = module.get_input_embeddings().weight.shape[0]
    more = new.num_rows - num_rows
    ids = sorted({*new.ids, *range(num_rows, new.num_rows)})
    if not ids:
        return
    if more > 0 and getattr(config.get_text_config(), "vocab_size_per_layer_input", None):
        raise ModelError(
            "it has a table of tokens for every layer beside its embedding, and transformers enlarges the embedding "
            "alone",
            where=where,
            fix="leave models[].add_tokens out, and use tokens that the model has unused",
        )
    if more > 0:
        # transformers draws the new rows, and they are replaced; the caller's random numbers stay as they were
        with quiet(), torch.random.fork_rng(devices=[]):
            module.resize_token_embeddings(num_rows + more, mean_resizing=False)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            if getattr(part, "vocab_size", None) == num_rows:
                part.vocab_size = num_rows + more
    head = None if is_reward_model(module) else head_of(module)
    for table in _tables(module.get_input_embeddings(), head):
        with torch.no_grad():
            table[ids] = _mean(table[: ids[0]])


def _tables(embedding: nn.Module, head: nn.Module | None) -> list[Tensor]:
    """What has a row per token, tied ones once."""
    found = [embedding.weight, *([] if head is None else [head.weight, getattr(head, "bias", None)])]
    return list({id(table): table for table in found if isinstance(table, Tensor)}.values())


def _mean(rows: Tensor) -> Tensor:
    """The mean of rows, in their dtype, summed in float64 without a copy of them all."""
    parts = [rows[i : i + ROWS_AT_ONCE].double().sum(0) for i in range(0, len(rows), ROWS_AT_ONCE)]
    return (torch.stack(parts).sum(0) / len(rows)).to(rows.dtype)


def trained_rows(
    module: PreTrainedModel, ids: Sequence[int], saved: Collection[str], where: str
) -> dict[str, list[int]]:
    """The rows that an adapter trains for new tokens, as peft takes them: name of the embedding or the head -> ids.

    Args:
        saved: full names of modules that are trained in full, with all their rows.

    Raises:
        ModelError: peft cannot train rows of this head.
    """
    if not ids:
        return {}
    embedding, head = module.get_input_embeddings(), None if is_reward_model(module) else head_of(module)
    names = {id(part): name for name, part in module.named_modules()}
    tables = [embedding]
    if head is not None and not getattr(module.config, "tie_word_embeddings", False):
        tables.append(head)  # with tied weights, peft lets the head follow the embedding
    alone = [part for part in tables if names[id(part)] not in saved]
    biased = head is not None and getattr(head, "bias", None) is not None
    if biased and alone:
        raise ModelError(
            "models[].add_tokens: its head has biases, which peft leaves out where it trains rows of the head",
            where=where,
            fix="train the embedding and the head in full (lora.modules_to_save), or all weights (lora.enabled: false)",
        )
    return {names[id(part)]: list(ids) for part in alone}
