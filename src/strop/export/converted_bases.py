"""Models that are trained from `consolidated.NN.pth`: converted once, into the cache. Floor 6.

A model is found again by its content: a hash of its weights, params.json and tokenizer files. So it is converted once,
however often it is trained and wherever it lies, and another file under the same name is another model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from strop.cachedir import cache_folder
from strop.config import RunConfig
from strop.export.folders import templates
from strop.policy.model.consolidated_files import PARAMS, check_consolidated, consolidated_folder

log = logging.getLogger("strop")

BESIDE = ("ref_model_id", "teacher_model_id")
"""Keys of `post_training` that name a model beside the one that trains."""


def with_converted(config: RunConfig, model_index: int | None = None) -> RunConfig:
    """The configuration with models in transformers' layout in place of consolidated ones.

    Args:
        model_index: look only at this model, from 0.

    Raises:
        ModelError: a model cannot be converted.
        SaveError, CheckpointError, ConfigError: there is no room in the cache, or it cannot be written.
    """
    wanted = range(len(config.models)) if model_index is None else [model_index]
    models = tuple(
        model.model_copy(update={"huggingface_id": in_transformers(model.huggingface_id)}) if i in wanted else model
        for i, model in enumerate(config.models)
    )
    if models != config.models:
        config = config.with_values({"models": models}, config.origins.get("models.0.huggingface_id", "given"))
    for name in BESIDE:
        other, key = getattr(config.post_training, name, None), f"post_training.{name}"
        if other is not None and (found := in_transformers(other)) != other:
            config = config.with_values({key: found}, config.origins.get(key, "given"))
    return config


def in_transformers(model_id: str) -> str:
    """The folder in the cache of a consolidated model; any other name as it is."""
    folder = consolidated_folder(model_id)
    if folder is None:
        return model_id
    check_consolidated(folder, str(folder))
    from strop.export.convert import SMALL_FILES, to_transformers  # imports peft and takes long; few models need it

    root = cache_folder("models", must_keep=True)
    target = root / _digest(folder, (*SMALL_FILES, *templates(str(folder))))
    with FileLock(root / f"{target.name}.lock"):
        if not target.is_dir():
            log.info("%s: converting it to transformers' layout, once; it is kept in %s", folder, target)
            to_transformers(str(folder), target)
    log.info("%s: as transformers reads it, it is %s; adapters name this folder as their base", folder, target)
    return str(target)


def _digest(folder: Path, small: Sequence[str]) -> str:
    """A hash of all files that the converted model is made of. small: names of those beside weights and params.json."""
    total = hashlib.blake2b(digest_size=20)
    names = {PARAMS, *small, *(path.name for path in folder.glob("consolidated.*.pth"))}
    for name in sorted(names):
        if (file := folder / name).is_file():
            with file.open("rb") as stream:
                total.update(f"{name} {hashlib.file_digest(stream, 'blake2b').hexdigest()}\n".encode())
    return total.hexdigest()
