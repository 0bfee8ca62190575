"""What an export reads and where it writes: the adapter of a run, a folder that nothing else is in. Floor 6."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from strop.config.sections import ModelSection
from strop.disk import ensure_space, refuse_in_the_way, unusable
from strop.durable import published
from strop.engine.final import RECIPE
from strop.errors import CheckpointError, ModelError, foreign_errors
from strop.manifest import MANIFEST, carries_manifest, read_manifest
from strop.policy.model.adapter_settings import read_adapter
from strop.policy.model.folder import fetch, place_of, source_of
from strop.policy.model.generation import GENERATION
from strop.rundir import FINAL

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What tokenizers of transformers consist of; a model has some of them."""
SMALL_FILES = 2**24
"""Bytes for all files but the weights, at most."""


def adapter_of(source: str, base: str | None = None) -> ModelSection:
    """The base and the adapter that `source` stands for.

    Args:
        source: a run folder, the folder of an adapter, or the hub id of one.
        base: the model that the adapter belongs to; None: as the adapter says.

    Raises:
        ModelError: it is no adapter, or does not say what it belongs to.
    """
    final = Path(source).expanduser() / FINAL
    adapter = str(final) if final.is_dir() else source
    where = f"adapter {adapter}"
    folder = source_of(adapter)
    if os.path.isdir(folder) and not os.path.lexists(Path(folder, ADAPTER_CONFIG)):
        whole = os.path.lexists(Path(folder, "config.json"))
        raise ModelError(
            "it is a whole model, without an adapter" if whole else f"there is no {ADAPTER_CONFIG}",
            where=adapter,
            expected="a run folder with final/, or a folder that peft has saved an adapter in",
            fix="use it as it is: there is nothing to merge"
            if whole
            else "check the path; a run that ended has final/",
        )
    settings, _ = read_adapter(adapter, where)
    named = base or settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(
            f"{ADAPTER_CONFIG} does not say which model it belongs to (base_model_name_or_path)",
            where=where,
            fix="name the model: --base MODEL",
        )
    if base is None and os.path.isabs(named) and not os.path.isdir(named):
        raise ModelError(
            f"its base is not there any more: {named}", where=where, fix="name where the base is now: --base MODEL"
        )
    revision = settings.get("revision") if base is None else None
    return ModelSection(huggingface_id=named, revision=revision, adapter=adapter, **_quantisation(Path(folder)))


def _quantisation(adapter: Path) -> dict[str, Any]:
    """How the base was quantised that a run trained the adapter on, as its manifest says; {}: it has none."""
    if not carries_manifest(adapter):
        return {}
    with foreign_errors(lambda why: ModelError(f"its {MANIFEST} cannot be read: {why}", where=str(adapter))):
        recipe = json.loads(read_manifest(adapter).identity.get(RECIPE, "{}"))
    keys = ("quant", "bnb_quant_type", "bnb_double_quant", "bnb_compute_dtype")
    return {key: recipe[f"models.0.{key}"] for key in keys if f"models.0.{key}" in recipe}


def check_output(target: Path, sources: Sequence[str]) -> None:
    """Refuse a folder that something is in, or that is one of `sources`, which are read.

    Raises:
        CheckpointError: it cannot be written, or holds files.
    """
    refuse_in_the_way(target)
    real = Path(os.path.realpath(target))
    for source in sources:
        if os.path.isdir(source) and real == Path(os.path.realpath(source)):
            raise CheckpointError("it is the folder that is read", where=str(target), fix="choose another --output-dir")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(
            f"the folder is in use: it holds {min(p.name for p in target.iterdir())}",
            where=str(target),
            expected="a folder that is not there yet, or is empty",
            fix="choose another --output-dir, or remove the folder",
        )


def check_room(target: Path, weights: int) -> None:
    """Refuse a folder on a disk that is too full.

    Args:
        weights: bytes of all weights that are to be written.

    Raises:
        SaveError: there is no room for them and the small files beside them.
    """
    ensure_space(target, weights + SMALL_FILES, "make room, or choose an --output-dir on another disk")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` once the block ends; if the block raises, nothing is left.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with published(target) as folder:
            yield folder
    except OSError as error:
        raise unusable(target, error, "--output-dir") from error


def copy_files(names: Iterable[str], source: str, revision: str | None, where: str, target: Path) -> None:
    """Copy those of these files that a model has. source: a folder or a hub id."""
    for name in names:
        if (file := fetch(source, name, revision, where, optional=True)) is not None:
            shutil.copyfile(file, target / name)


def copy_tokenizer(model: ModelSection, target: Path) -> None:
    """The tokenizer and the generation settings of an adapter, which a run saves beside it; else those of its base."""
    assert model.adapter is not None
    where = place_of(model)
    adapter, base = source_of(model.adapter), source_of(model.huggingface_id)
    has_own = fetch(adapter, "tokenizer.json", None, where, optional=True) is not None
    source, revision = (adapter, None) if has_own else (base, model.revision)
    copy_files(TOKENIZER_FILES, source, revision, where, target)
    copy_files([GENERATION], base, model.revision, where, target)
    copy_files([GENERATION], adapter, None, where, target)  # in place of the base's
