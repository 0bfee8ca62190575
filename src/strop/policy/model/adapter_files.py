"""The weights of a saved adapter, and whether a model is the base that they were trained on. Floor 2."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from strop.config.sections import ModelSection
from strop.errors import ModelError, foreign_errors
from strop.manifest import MANIFEST
from strop.policy.model.adapter_base import base_files
from strop.policy.model.adapter_settings import AGAIN
from strop.policy.model.folder import inspect_model, source_of
from strop.policy.model.model_hashes import files_hash, have_other_numbers
from strop.readable import short_name

logger = logging.getLogger("strop")


def check_base(settings: Mapping[str, Any], model: ModelSection, where: str) -> None:
    """Refuse a model that is not the base that a run of strop trained the adapter on. Where that is not known, say that
    it has another name than the base that the adapter names.

    Raises:
        ModelError: its tensors are those of the base, with other numbers in them.
    """
    assert model.adapter is not None
    made_from, source = settings.get("base_model_name_or_path"), source_of(model.huggingface_id)
    known = base_files(model.adapter)
    found = None if known is None else files_hash(inspect_model(model).weights)
    if known is not None and found is not None and have_other_numbers(known, found):
        raise ModelError(
            f"it was trained on another model than {source}, one with the same tensors and other numbers in them",
            where=where,
            expected=f"the weights of {made_from}, as they were when the adapter was trained",
            fix=f"name that model; to use it on this one all the same, remove {MANIFEST} from the adapter's folder",
        )
    named_alike = os.path.basename(str(made_from).rstrip("/")) == os.path.basename(source)
    if made_from and not named_alike and (known is None or found != known):
        logger.warning("%s: it was made on %s; it is used on %s", where, made_from, source)


def read_weights(file: Path, where: str) -> dict[str, Tensor]:
    """The tensors of an adapter.

    Raises:
        ModelError: the file is damaged, or holds other numbers than floating point ones.
    """
    with foreign_errors(lambda why: ModelError(f"{file.name} is damaged: {why}", where=where, fix=AGAIN)):
        stored: dict[str, Tensor] = load_file(file)
    if other := next((name for name, tensor in stored.items() if not tensor.is_floating_point()), None):
        raise ModelError(
            f"{file.name}: {other} is in {short_name(stored[other].dtype)}",
            where=where,
            expected="floating point numbers, as peft saves them",
            fix=AGAIN,
        )
    return stored
