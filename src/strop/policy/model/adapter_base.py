"""A saved adapter and the base it belongs to, by the files beside it. Floor 2, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.config.sections import ModelSection
from strop.errors import ModelError, foreign_errors
from strop.manifest import BASE, MANIFEST, RECIPE, carries_manifest, read_manifest
from strop.policy.model.folder import adapter_files, fetch, read_json, source_of
from strop.rundir import FINAL

ADAPTER_CONFIG = "adapter_config.json"


def saved_model(given: str) -> ModelSection:
    """A model, or an adapter with its base.

    Args:
        given: a run folder, the folder of an adapter or a model, or the hub id of one.

    Raises:
        ModelError: it is an adapter that does not say what it belongs to.
    """
    place = _finished(given)
    if fetch(source_of(place), ADAPTER_CONFIG, None, given, optional=True) is not None:
        return adapter_of(place)
    # messages name it by its last part, which "." and ".." have not
    is_nameless = bool(place) and os.path.basename(os.path.normpath(place)) in (os.curdir, os.pardir)
    return ModelSection(huggingface_id=source_of(place) if is_nameless else place)


def _finished(given: str) -> str:
    """The finished model of a run folder; anything else as it is.

    Raises:
        ModelError: the run has not ended, or it is a checkpoint.
    """
    place = Path(given).expanduser()
    if (place / FINAL).is_dir():
        return str(place / FINAL)
    is_model = any((place / name).is_file() for name in (ADAPTER_CONFIG, "config.json"))
    if (place / "config.yaml").is_file() and not is_model:
        raise ModelError("the run has no final/ yet", where=given, fix="let it end, or strop train --resume")
    if carries_manifest(place) and not is_model:
        raise ModelError(
            "it is a checkpoint, which holds no more than what was trained",
            where=given,
            expected="a run that has ended, an adapter or a model",
            fix="name the run; one that was interrupted is ended by strop train --resume",
        )
    return given


def is_of_reward_model(adapter: str, where: str) -> bool:
    """Whether an adapter belongs to a reward model, as its adapter_config.json says.

    Raises:
        ModelError: it cannot be read.
    """
    return bool(read_json(adapter_files(adapter, where)[0], where).get("task_type") == "SEQ_CLS")


def adapter_of(source: str, base: str | None = None) -> ModelSection:
    """The base and the adapter that `source` stands for.

    Args:
        source: a run folder, the folder of an adapter, or the hub id of one.
        base: the model that the adapter belongs to; None: as the adapter says.

    Raises:
        ModelError: it is no adapter, or does not say what it belongs to.
    """
    adapter = _finished(source)
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
    settings = read_json(adapter_files(adapter, where)[0], where)
    named = base or settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(
            f"{ADAPTER_CONFIG} does not say which model it belongs to (base_model_name_or_path)",
            where=where,
            fix="name the model: --base MODEL",
        )
    if base is None and os.path.isabs(named) and not os.path.isdir(named):
        raise ModelError(
            f"its base is not there any more: {named}",
            where=where,
            fix="put the base back there, or merge the two: strop merge ADAPTER --base MODEL --output-dir DIR",
        )
    revision = settings.get("revision") if base is None else None
    return ModelSection(huggingface_id=named, revision=revision, adapter=adapter, **_quantisation(Path(folder)))


def base_files(adapter: str) -> str | None:
    """The files of the base that an adapter was trained on, as `model_hashes.files_hash` has them; None: not known.

    Raises:
        ModelError: its manifest cannot be read.
    """
    return _identity(Path(source_of(_finished(adapter)))).get(BASE)


def _quantisation(adapter: Path) -> dict[str, Any]:
    """How the base was quantised that a run trained the adapter on, as its manifest says; {}: it has none."""
    with foreign_errors(lambda why: _unreadable(why, adapter)):
        recipe = json.loads(_identity(adapter).get(RECIPE, "{}"))
    keys = ("quant", "bnb_quant_type", "bnb_double_quant", "bnb_compute_dtype")
    return {key: recipe[f"models.0.{key}"] for key in keys if f"models.0.{key}" in recipe}


def _identity(adapter: Path) -> Mapping[str, str]:
    """What a run wrote down of what it made the adapter from; {}: it is not of a run."""
    if not carries_manifest(adapter):
        return {}
    with foreign_errors(lambda why: _unreadable(why, adapter)):
        return read_manifest(adapter).identity


def _unreadable(why: str, adapter: Path) -> ModelError:
    return ModelError(f"its {MANIFEST} cannot be read: {why}", where=str(adapter))
