"""Where an answer ends: what a model's generation settings say, what training taught, what is saved. Floor 2.

Training closes completions with an end token. Where the model that is saved does not stop at it, `generate` and servers
run on; so the tokens that training wrote at the end join `eos_token_id` of generation_config.json, and a base model
that becomes a chat model gets its tokenizer's end token from training, too.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from strop.config.sections import ModelSection
from strop.errors import ModelError
from strop.policy.model.configuration import model_config
from strop.policy.model.folder import (
    GENERATION,
    adapter_place_of,
    fetch,
    inspect_config,
    place_of,
    read_json,
    source_of,
)
from strop.types import Completion, Group

logger = logging.getLogger("strop")

MOST = 10_000
"""Groups that are looked at, evenly spread."""
SHARE = 0.01
"""Of the completions that end in a special token: what ends fewer is an accident, such as a cut."""
SOLE = 0.99
"""Share of these that a token must end to be the tokenizer's end token."""


def trained_ends(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> dict[int, float]:
    """The special or added tokens that close completions, as they are trained, with the share of completions that each
    closes; the most frequent first. Empty where completions end in plain text."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    step = max(1, len(groups) // MOST)
    last = Counter(_last_trained(c) for i in range(0, len(groups), step) for c in groups[i].completions)
    ends = {token: count for token, count in last.most_common() if token is not None and token in special}
    total = sum(ends.values())
    return {token: count / total for token, count in ends.items() if count >= SHARE * total}


def _last_trained(completion: Completion) -> int | None:
    at = completion.loss_mask.rfind(1)
    return None if at < 0 else int(completion.ids[at])


def stopping(config: GenerationConfig | None, ends: Sequence[int]) -> GenerationConfig:
    """The generation settings of a model that was trained to end with `ends`: its own, and stops at these too."""
    found = copy.deepcopy(config) if config is not None else GenerationConfig()
    known = _as_list(found.eos_token_id)
    stops = [*known, *(token for token in ends if token not in known)]
    if stops != known:
        found.eos_token_id = stops if len(stops) > 1 else stops[0]
    return found


def _as_list(tokens: Any) -> list[int]:
    return [tokens] if isinstance(tokens, int) else list(tokens or ())


def closing(
    tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None, ends: dict[int, float]
) -> PreTrainedTokenizerBase:
    """The tokenizer to save: with the trained end token as its end token, where a base model became a chat model by it.

    Families differ: Qwen and Llama name the end of a turn in the tokenizers of their chat models, Gemma leaves the end
    of the text there. A model that stopped at the token before is such a chat model, and is left as it is. So is a
    tokenizer whose template writes its end token, or that closes every text with it.
    """
    sole = next((token for token, share in ends.items() if share >= SOLE), None)
    if sole is None or sole == tokenizer.eos_token_id or sole in _as_list(getattr(config, "eos_token_id", None)):
        return tokenizer
    if "eos_token" in str(tokenizer.chat_template or "eos_token") or getattr(tokenizer, "add_eos_token", False):
        return tokenizer
    named = copy.deepcopy(tokenizer)
    named.eos_token = tokenizer.convert_ids_to_tokens(sole)
    return named


def write_generation(
    folder: Path,
    config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    ends: dict[int, float] | None,
    where: str,
) -> None:
    """Write generation_config.json and the tokenizer into `folder`, and say what of them is other than the base's.

    Args:
        config: the base model's. ends: as `trained_ends` gives them; None: nothing is known of them.
    """
    stops, closed = stopping(config, list(ends or ())), closing(tokenizer, config, ends or {})
    if config is not None or ends:
        # not save_pretrained, which refuses settings that contradict each other, as some models bring them
        (folder / GENERATION).write_text(stops.to_json_string(use_diff=True), encoding="utf-8")
    closed.save_pretrained(str(folder))
    before = _as_list(getattr(config, "eos_token_id", None))
    if added := [str(tokenizer.convert_ids_to_tokens(token)) for token in ends or () if token not in before]:
        named = f"; the tokenizer's end token is {closed.eos_token}" if closed is not tokenizer else ""
        logger.info(
            "%s: answers were trained to end with %s, where the base model did not stop: it stands in "
            "generation_config.json of the result%s",
            where,
            ", ".join(added),
            named,
        )
    if ends is not None and not ends:
        logger.warning("%s: no completion ends with a special token: generation may not stop by itself", where)


def stop_tokens(model: ModelSection) -> tuple[int, ...]:
    """The tokens at which `generate` of transformers stops with this model: `eos_token_id` of generation_config.json,
    an adapter's own before its base's, and without these files, of config.json. Empty where none names one.

    Raises:
        ModelError: a file cannot be read, or names something else.
    """
    if model.adapter is not None:
        where = adapter_place_of(model)
        own = fetch(source_of(model.adapter), GENERATION, None, where, optional=True)
        if own is not None and (stops := _stops_in(own, where)):
            return stops
    where = place_of(model)
    file = fetch(source_of(model.huggingface_id), GENERATION, model.revision, where, optional=True)
    if file is not None:
        return _stops_in(file, where)
    found = inspect_config(model).config.get("eos_token_id")
    if found is None:  # the architecture may have a default
        found = GenerationConfig.from_model_config(model_config(model)).eos_token_id
    return _checked_ids(found, "config.json", where)


def end_tokens(model: ModelSection, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end what this model generates, in training and afterwards: those of `stop_tokens`, else the
    tokenizer's end token. Empty where there is none.

    Raises:
        ModelError: as `stop_tokens`.
    """
    own = tokenizer.eos_token_id
    return stop_tokens(model) or (() if own is None else (int(own),))


def _stops_in(file: Path, where: str) -> tuple[int, ...]:
    """`eos_token_id` of a generation_config.json; empty where it names none.

    Raises:
        ModelError: the file cannot be read, or names something else.
    """
    return _checked_ids(read_json(file, where).get("eos_token_id"), file.name, where)


def _checked_ids(found: Any, file: str, where: str) -> tuple[int, ...]:
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if wrong := [token for token in listed if type(token) is not int]:
        raise ModelError(
            f"{file}: eos_token_id holds {str(wrong[0])[:40]!r}",
            where=where,
            expected="the id of a token, or a list of them",
            fix="download or copy the file again",
        )
    return tuple(token for token in listed if token >= 0)
