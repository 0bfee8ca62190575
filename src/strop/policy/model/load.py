"""A model section to a tokenizer and a model, or to one clear message. Floor 2.

Loading is strict: safetensors only, every weight of the model in the files and every shape right, finite numbers, a
vocabulary that covers the tokenizer. The model's own dropout is switched off: only `lora.lora_dropout` acts.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from strop.config.names import closest
from strop.config.sections import ModelSection
from strop.errors import ModelError, first_line, foreign_errors
from strop.policy.allocator import is_out_of_memory
from strop.policy.model.folder import ConfigFile, fetch, has_weights, inspect_config, inspect_model, place_of, source_of
from strop.policy.model.guard import check_sealed
from strop.policy.model.random_parts import silence_config, silence_modules
from strop.policy.model.tokenizer_patterns import check_patterns
from strop.policy.precision import nonfinite, short_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("strop")

# what transformers, tokenizers, safetensors and huggingface_hub raise at broken or foreign files
DOWNLOAD_AGAIN = "download or copy the file again"

LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
_OTHER_TASKS = ("Classification", "MaskedLM", "QuestionAnswering", "Reward", "NextSentence", "MultipleChoice")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """module: on the CPU, in the mode that whoever made it left it in. stored: dtype of the weights in the files.
    config: the model's configuration as it was before strop changed it for training, which is what is saved with the
    result."""

    module: PreTrainedModel
    stored: torch.dtype
    config: PreTrainedConfig


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers and peft off the terminal; warnings go to the debug log."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        for warning in caught:
            logger.debug("%s", warning.message)


def load_tokenizer(model: ModelSection, *, needs_weights: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer, untouched: no padding token is added, since padding is masked whatever its id.

    The model beside it is looked at first, as far as that is quick: before hours of data, and so that what is wrong
    with a model is not said of its tokenizer.

    Args:
        needs_weights: refuse a folder without weights, too.

    Raises:
        ModelError: there is no such model or no tokenizer, it cannot be read, or has no end-of-sequence token.
    """
    where, (source, rows) = place_of(model), _look_at(model, needs_weights)

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
        if file := fetch(source, "tokenizer.json", model.revision, where, optional=True):
            check_patterns(file, where)
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    _merge_always(tokenizer, where)
    for how in ("is_local", "local_files_only"):  # how it was found; not to be saved with it
        tokenizer.init_kwargs.pop(how, None)
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
    if rows is not None:
        _check_ids(tokenizer, rows, where)
    return tokenizer


def _merge_always(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Switch random merges off: the same text is to be the same tokens, in training and after it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        logger.warning("%s: its tokenizer leaves out merges at random (dropout %g); that is off", where, dropout)
        tokenizer.backend_tokenizer.model.dropout = None


@contextmanager
def model_errors(where: str, doing: str) -> Iterator[None]:
    """What a model's own code raises, as one error; running out of memory comes through.

    Raises:
        ModelError: anything else went wrong.
    """

    def failed(why: str) -> ModelError:
        return ModelError(
            f"{doing} fails: {why}",
            where=where,
            expected="a config.json that belongs to the weights",
            fix="download or copy config.json again; it is what decides how the model computes",
        )

    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error) or not isinstance(error, Exception):
            raise
        with foreign_errors(failed):
            raise


def load_model(model: ModelSection, *, dtype: torch.dtype) -> LoadedModel:
    """The model on the CPU, its weights in `dtype`, its dropout off.

    Raises:
        ModelError: it cannot be loaded completely and safely as a causal language model.
    """
    where, files = place_of(model), inspect_model(model)
    if os.path.isdir(files.source):
        check_sealed(Path(files.source), where, weights=True)
    if files.ignored:
        names = ", ".join(files.ignored)
        logger.warning("%s: ignored in config.json, since trust_remote_code is false: %s", where, names)
    if model.revision is not None and os.path.isdir(files.source):
        logger.warning("%s: revision %s is not read: the model is a folder on this machine", where, model.revision)
    config = _build_config(model, files, where)
    _check_task(config, where)
    original = copy.deepcopy(config)
    silenced = silence_config(config)
    attention = _plain_attention(model, config, where)
    from transformers import AutoModelForCausalLM  # seconds, which a dry run's first example does not wait for

    try:
        with quiet():
            module, report = AutoModelForCausalLM.from_pretrained(
                files.source,
                config=config,
                revision=files.revision,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensors' names
                output_loading_info=True,
                **attention,
            )
    except LOAD_ERRORS as error:
        raise ModelError(
            f"it cannot be loaded: {first_line(error)}",
            where=where,
            fix="check models[].attn_implementation" if attention else "download or save the model again",
        ) from error
    _check_complete(report, where)
    _check_finite(module, where)
    silenced |= silence_modules(module)
    if silenced:
        values = ", ".join(f"{name} {value:g}" for name, value in sorted(silenced.items()))
        logger.info("%s: its own dropout is off while training (%s); only lora_dropout acts", where, values)
    module.config.use_cache = False
    return LoadedModel(module, files.stored, original)


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


def _look_at(model: ModelSection, needs_weights: bool) -> tuple[str, int | None]:
    """Refuse what cannot be trained by what is quickly seen: config.json, and the weights' headers in a folder.

    Returns:
        The folder, or the hub id; and the rows of the embedding, where config.json says them.
    """
    where = place_of(model)
    if not os.path.isdir(source_of(model.huggingface_id)) and not constants.HF_HUB_OFFLINE:
        logger.info("%s: asking %s for it", where, constants.ENDPOINT)
    file = inspect_config(model)
    if model.trust_remote_code and "auto_map" in file.config:
        return file.source, None  # its code runs when it is loaded
    config = _build_config(model, file, where)

    def undescribed(why: str) -> ModelError:
        return ModelError(f"config.json does not describe a model: {why}", where=where, fix=DOWNLOAD_AGAIN)

    with foreign_errors(undescribed):
        _check_task(config, where)
        rows = getattr(config.get_text_config(), "vocab_size", None)
    if os.path.isdir(file.source) and (needs_weights or has_weights(file.source)):
        inspect_model(model)
    return file.source, rows if isinstance(rows, int) else None


def model_config(model: ModelSection) -> PreTrainedConfig:
    """The configuration alone, as a model is built from it; no weight is looked at.

    Raises:
        ModelError: there is no such model, or it is none that may be loaded.
    """
    return _build_config(model, inspect_config(model), place_of(model))


def _build_config(model: ModelSection, files: ConfigFile, where: str) -> PreTrainedConfig:
    kind = files.config.get("model_type")
    has_code = model.trust_remote_code and "auto_map" in files.config
    if not has_code:
        _check_kind(kind, model, where)
    try:
        with quiet():
            if has_code:
                return AutoConfig.from_pretrained(files.source, revision=files.revision, trust_remote_code=True)
            config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(files.config)))
            config.return_dict = True  # how a forward hands its results over, which changes none
            return config
    except LOAD_ERRORS as error:
        detail = " ".join(str(error).split())
        raise ModelError(f"config.json does not describe a model: {detail}", where=where, fix=DOWNLOAD_AGAIN) from error


def _check_kind(kind: Any, model: ModelSection, where: str) -> None:
    known = list(CONFIG_MAPPING.keys())
    if isinstance(kind, str) and kind in known:
        return
    if kind is None:
        raise ModelError("config.json names no model_type", where=where, expected='such as "model_type": "llama"')
    nearest = closest(str(kind), known)
    raise ModelError(
        f"its model_type {kind!r} is unknown to this version of transformers",
        where=where,
        expected=f"an architecture of transformers{f', such as {nearest!r}' if nearest else ''}",
        fix="upgrade transformers; or, if the model brings its own code and you have read it, "
        "set models[].trust_remote_code: true",
    )


def _check_task(config: PreTrainedConfig, where: str) -> None:
    fix = "choose a decoder-only model with a language modelling head"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("it is an encoder-decoder model", where=where, expected="a causal language model", fix=fix)
    native = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not native and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(f"{config.model_type} is not a causal language model", where=where, expected="one", fix=fix)
    for name in getattr(config, "architectures", None) or ():
        if any(task in name for task in _OTHER_TASKS):
            raise ModelError(
                f"it was saved as {name}, without a language modelling head",
                where=where,
                expected="a causal language model",
                fix=fix,
            )


def _plain_attention(model: ModelSection, config: PreTrainedConfig, where: str) -> dict[str, str]:
    """The attention of plain rows, where it is not transformers' choice; its choice for capped scores has been sdpa,
    which leaves the cap out."""
    name = model.attn_implementation
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if name is None:
        return {"attn_implementation": "eager"} if capped else {}
    if capped and name == "sdpa":
        raise ModelError(
            "attn_implementation: sdpa cannot cap attention scores, as this model does (attn_logit_softcapping)",
            where=where,
            fix="set models[].attn_implementation to eager, or leave it out",
        )
    if "/" in name and not model.trust_remote_code:
        raise ModelError(
            f"attn_implementation: {name!r} names a kernel on the hub, which is code",
            where=where,
            expected="sdpa, eager, flash_attention_2, ...",
            fix="set models[].trust_remote_code: true if you trust its source",
        )
    return {"attn_implementation": name}


def _check_complete(report: Mapping[str, Any], where: str) -> None:
    """transformers fills gaps with random numbers and a warning; here every gap is an error."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{len(mismatched)} weights have another shape than config.json says, the first is {name}: {list(found)}",
            where=where,
            expected=str(list(expected)),
            fix="use the config.json and the weights of one and the same model",
        )
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from its files, the first is {missing[0]}",
            where=where,
            expected="every weight of the model; a missing one would be random",
            fix="download the model again, completely",
        )
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning(
            "%s: %d tensors in its files are not part of the model and are left out, the first is %s",
            where,
            len(unexpected),
            unexpected[0],
        )


def _check_finite(module: nn.Module, where: str) -> None:
    weights = dict(module.named_parameters())
    if bad := nonfinite(weights):
        raise ModelError(
            f"{bad[0]} holds NaN or infinity (as {short_name(weights[bad[0]].dtype)})",
            where=where,
            expected="finite weights",
            fix="download the model again; if it is whole, it is broken, or too large for float16",
        )
