"""What a model's generation settings say about where an answer ends. Floor 2.

In: a model section. Out: the ids of the tokens at which `generate` stops.
"""

from __future__ import annotations

from strop.config.sections import ModelSection
from strop.policy.folder import fetch, place_of, read_json, source_of


def stop_tokens(model: ModelSection) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json; empty where the model has none.

    Raises:
        ModelError: the file cannot be read.
    """
    where = place_of(model)
    file = fetch(source_of(model.huggingface_id), "generation_config.json", model.revision, where, optional=True)
    found = read_json(file, where).get("eos_token_id") if file is not None else None
    listed = found if isinstance(found, list) else [found]
    return tuple(token for token in listed if type(token) is int)
