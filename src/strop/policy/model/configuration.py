"""config.json to the configuration class of its architecture, or to one clear message. Floor 2.

The classes are imported when the first one is built, which takes seconds.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)
from transformers.utils import logging as transformers_logging

from strop.config.names import closest
from strop.config.sections import ModelSection
from strop.errors import ModelError, foreign_errors
from strop.policy.model.folder import ConfigFile, inspect_config, place_of

logger = logging.getLogger("strop")

DOWNLOAD_AGAIN = "download or copy the file again"

# what transformers, tokenizers, safetensors and huggingface_hub raise at broken or foreign files
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


def vocabulary_of(model: ModelSection, *, reward_model: bool = False) -> int | None:
    """Rows of the embedding, as config.json says; None where it does not say, or where the model's own code decides.

    Raises:
        ModelError: config.json does not describe a causal language model, or one that can become a reward model.
    """
    where, file = place_of(model), inspect_config(model)
    if model.trust_remote_code and "auto_map" in file.config:
        return None  # its code runs when it is loaded
    config = build_config(model, file, where)

    def undescribed(why: str) -> ModelError:
        return ModelError(f"config.json does not describe a model: {why}", where=where, fix=DOWNLOAD_AGAIN)

    with foreign_errors(undescribed):
        check_task(config, where, reward_model=reward_model)
        rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def model_config(model: ModelSection) -> PreTrainedConfig:
    """The configuration alone, as a model is built from it; no weight is looked at.

    Raises:
        ModelError: there is no such model, or it is none that may be loaded.
    """
    return build_config(model, inspect_config(model), place_of(model))


def build_config(model: ModelSection, files: ConfigFile, where: str) -> PreTrainedConfig:
    """The configuration from config.json as `inspect_config` gives it.

    Raises:
        ModelError: it describes no model that transformers has.
    """
    kind = files.config.get("model_type")
    has_code = model.trust_remote_code and "auto_map" in files.config
    if not has_code:
        check_kind(kind, model, where)
    try:
        with quiet():
            if has_code:
                return AutoConfig.from_pretrained(files.source, revision=files.revision, trust_remote_code=True)
            return copy.deepcopy(_from_json(str(kind), json.dumps(dict(files.config))))
    except LOAD_ERRORS as error:
        detail = " ".join(str(error).split())
        raise ModelError(f"config.json does not describe a model: {detail}", where=where, fix=DOWNLOAD_AGAIN) from error


@lru_cache(maxsize=8)
def _from_json(kind: str, text: str) -> PreTrainedConfig:
    """Kept, since a run asks for it some ten times and each takes milliseconds."""
    config = CONFIG_MAPPING[kind].from_dict(json.loads(text))
    config.return_dict = True  # how a forward hands its results over, which changes none
    return config


def check_kind(kind: Any, model: ModelSection, where: str) -> None:
    """Refuse an architecture that transformers does not have.

    Raises:
        ModelError: `kind`, `model_type` of config.json, is none of its names.
    """
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


def check_task(config: PreTrainedConfig, where: str, *, reward_model: bool = False) -> None:
    """Refuse what is not a causal language model.

    Args:
        reward_model: it is to become a reward model, or to stay one.

    Raises:
        ModelError: it is a model of another kind.
    """
    if reward_model and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no sequence classification for {config.model_type}",
            where=where,
            expected="an architecture of which it makes reward models, such as llama or qwen3",
            fix="choose another model",
        )
    fix = "choose a decoder-only model with a language modelling head"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("it is an encoder-decoder model", where=where, expected="a causal language model", fix=fix)
    native = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not native and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(f"{config.model_type} is not a causal language model", where=where, expected="one", fix=fix)
    for name in getattr(config, "architectures", None) or ():
        if reward_model and name.endswith("ForSequenceClassification"):
            if config.num_labels != 1:
                raise ModelError(
                    f"it was saved as {name} with {config.num_labels} labels",
                    where=where,
                    expected="a language model, or a reward model: one label",
                    fix=fix,
                )
        elif any(task in name for task in _OTHER_TASKS):
            raise ModelError(
                f"it was saved as {name}, without a language modelling head",
                where=where,
                expected="a causal language model",
                fix=fix,
            )
