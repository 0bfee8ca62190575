"""The tokenizer of a model section, or one clear message. Floor 2."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

from huggingface_hub import constants
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from strop.config.sections import ModelSection
from strop.errors import ModelError, foreign_errors
from strop.policy.model.added_tokens import NewTokens, add_to_tokenizer, of_adapter
from strop.policy.model.configuration import check_kind, quiet, vocabulary_of
from strop.policy.model.folder import (
    ConfigFile,
    adapter_files,
    adapter_place_of,
    fetch,
    has_weights,
    inspect_config,
    inspect_model,
    place_of,
    read_json,
    source_of,
)
from strop.policy.model.quantisation_settings import quantisation_of
from strop.policy.model.tokenizer_patterns import check_patterns

logger = logging.getLogger("strop")


def load_tokenizer(model: ModelSection, *, needs_weights: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer (`read_tokenizer`), after a look at the model (`check_model`).

    Args:
        needs_weights: refuse a folder without weights, too.

    Raises:
        ModelError: either is refused.
    """
    tokenizer = read_tokenizer(model, needs_weights=needs_weights)
    check_model(model, tokenizer, needs_weights=needs_weights)
    return tokenizer


def read_tokenizer(model: ModelSection, *, needs_weights: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer, untouched: no padding token is added, since padding is masked whatever its id. Where the
    model has an adapter with a tokenizer beside it, that one: a run saves there what it trained by. It has the tokens
    of `models[].add_tokens`.

    The model folder is checked only if the tokenizer fails, so the tokenizer is not blamed for a broken model. Call
    `check_model` first if many rows will be read.

    Args:
        needs_weights: refuse a folder without weights, where the model is looked at.

    Raises:
        ModelError: there is no such model or no tokenizer, it cannot be read, or has no end-of-sequence token.
    """
    try:
        tokenizer = _adapter_tokenizer(model) or _read(model)
    except ModelError:
        check_model(model, needs_weights=needs_weights)
        raise
    add_to_tokenizer(tokenizer, model.add_tokens or (), place_of(model))
    return tokenizer


def new_tokens(model: ModelSection) -> NewTokens:
    """What the model needs beside what is in its files: tokens of `models[].add_tokens` that it does not have, or rows
    that its adapter has trained.

    Raises:
        ModelError: tokenizer or adapter cannot be read.
    """
    if model.adapter is not None:
        where = adapter_place_of(model)
        config, weights = adapter_files(model.adapter, where)
        return of_adapter(read_json(config, where), weights)
    if not model.add_tokens:
        return NewTokens()
    ids = add_to_tokenizer(_read(model), model.add_tokens, place_of(model), tell=False)
    return NewTokens(ids, max(ids, default=-1) + 1)


def check_model(
    model: ModelSection,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    needs_weights: bool = True,
    reward_model: bool = False,
) -> None:
    """Refuse what cannot be trained by what is quickly seen, before hours of data: config.json, the headers of the
    weights in a folder, and whether the tokenizer's ids have embeddings.

    Args:
        needs_weights: refuse a folder without weights, too.
        reward_model: it is to become a reward model, or to stay one.

    Raises:
        ModelError: it is not a model that can be trained.
    """
    rows, source = vocabulary_of(model, reward_model=reward_model), source_of(model.huggingface_id)
    quantisation_of(model)
    if os.path.isdir(source) and (needs_weights or has_weights(source)):
        inspect_model(model)
    if tokenizer is not None and rows is not None:
        _check_ids(tokenizer, max(rows, new_tokens(model).num_rows), place_of(model))


def _read(model: ModelSection) -> PreTrainedTokenizerBase:
    where = place_of(model)
    if not os.path.isdir(source_of(model.huggingface_id)) and not constants.HF_HUB_OFFLINE:
        logger.info("%s: asking %s for it", where, constants.ENDPOINT)
    file = inspect_config(model)
    source = file.source

    def not_loaded(why: str) -> ModelError:
        local = os.path.isdir(source)
        absent = local and not os.path.exists(os.path.join(source, "tokenizer.json"))
        return ModelError(
            "there is no tokenizer.json" if absent else f"its tokenizer cannot be loaded: {why}",
            where=where,
            expected="tokenizer.json and tokenizer_config.json in the model's folder or repository",
            fix="copy the tokenizer of the model it was made from into the folder"
            if local
            else "choose a model with a tokenizer, or download the model and add one to its folder",
        )

    with foreign_errors(not_loaded), quiet():
        if rules := fetch(source, "tokenizer.json", model.revision, where, optional=True):
            check_patterns(rules, where)
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=_names(model, file), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    for how in ("is_local", "local_files_only"):  # how it was found; not to be saved with it
        tokenizer.init_kwargs.pop(how, None)
    return _settled(tokenizer, where)


def _adapter_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder of the model's adapter, with its chat template; None where there is none.

    Raises:
        ModelError: it cannot be read, or has no end-of-sequence token.
    """
    if model.adapter is None:
        return None
    where, source = adapter_place_of(model), source_of(model.adapter)
    rules = fetch(source, "tokenizer.json", None, where, optional=True)
    if rules is None:
        return None
    with foreign_errors(lambda why: ModelError(f"its tokenizer cannot be loaded: {why}", where=where)), quiet():
        check_patterns(rules, where)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return _settled(tokenizer, where)


def _settled(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with random merges off.

    Raises:
        ModelError: it has no tokens, or none that ends a sequence.
    """
    _merge_always(tokenizer, where)
    if len(tokenizer.get_vocab()) == 0:
        raise ModelError(
            "its tokenizer has no tokens", where=where, fix="copy the right tokenizer.json into the folder"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "its tokenizer has no end-of-sequence token, so no completion could ever learn to end",
            where=where,
            fix='name one in tokenizer_config.json, such as "eos_token": "<|endoftext|>"',
        )
    return tokenizer


def _names(model: ModelSection, file: ConfigFile) -> SimpleNamespace | None:
    """What `AutoTokenizer` reads of a configuration where tokenizer_config.json names a class of transformers: names.
    The configuration itself takes seconds to import. None: `AutoTokenizer` has to build it.

    Raises:
        ModelError: the architecture is not known, or tokenizer_config.json cannot be read.
    """
    if model.trust_remote_code:
        return None
    where, kind = place_of(model), file.config.get("model_type")
    check_kind(kind, model, where)
    settings = fetch(file.source, "tokenizer_config.json", model.revision, where, optional=True)
    content = read_json(settings, where) if settings is not None else {}
    if not isinstance(content.get("tokenizer_class"), str) or "auto_map" in content:
        return None
    own = file.config.get("tokenizer_class")
    return SimpleNamespace(model_type=kind, tokenizer_class=own, _name_or_path=file.source)


def _merge_always(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Switch random merges off: the same text is to be the same tokens, in training and after it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        logger.warning("%s: its tokenizer leaves out merges at random (dropout %g); that is off", where, dropout)
        tokenizer.backend_tokenizer.model.dropout = None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, module: nn.Module, where: str) -> None:
    """Every token must have an embedding.

    Raises:
        ModelError: the tokenizer has ids beyond the embedding's rows.
    """
    _check_ids(tokenizer, module.get_input_embeddings().weight.shape[0], where)  # type: ignore[operator]


def _check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        raise ModelError(
            f"its tokenizer has {len(beyond)} tokens without an embedding, the first is {beyond[0][1]!r} "
            f"with id {beyond[0][0]}",
            where=where,
            expected=f"ids below {rows}, the rows of the model's embedding",
            fix="use the tokenizer that belongs to the model, or resize the model's embedding and save it first",
        )
