"""What a model folder or hub repository holds, looked at before any of it is loaded. Floor 2.

A `ModelSection` comes in, `ModelFiles` go out: the configuration without anything that could run code or name a
kernel, and safetensors files that are all there. Nothing here unpickles, imports or executes what it reads.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from strop.config.sections import ModelSection
from strop.errors import ModelError, first_line
from strop.policy.model.consolidated_files import check_consolidated, consolidated_folder
from strop.policy.model.folder_safety import LONGEST_JSON, check_links, check_numbers, check_sealed, contained

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("strop")

GENERATION = "generation_config.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
"""By which a model reads images and sound; the text model inside of it is trained, and the rest stays as it was."""
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes of weights that are not quantised: safetensors' names -> torch's."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OF_A_TRAINING = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler)\.(bin|pt)|rng_state(_\d+)?\.pth")
"""Names of pickles that transformers' Trainer leaves beside a model, which are none of its weights."""
_STRIPPED = ("auto_map", "trust_remote_code", "custom_pipelines")
_DROPPED = ("attn_implementation", "experts_implementation", "fusion_config", "distributed_config", "kernel_config")
_MODEL_FOLDER = "a folder with config.json, *.safetensors and tokenizer.json"
_FLOATS = ("Infinity", "-Infinity", "NaN")
_HARMLESS = ("_name_or_path", "_commit_hash", "_attn_implementation_autoset")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """source: a folder or a hub id. revision: the commit, for the hub. config: config.json, cleaned. ignored: the
    keys that were left out of it."""

    source: str
    revision: str | None
    config: Mapping[str, Any]
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFiles(ConfigFile):
    """weights: safetensors files. stored: dtype that holds most of the weights."""

    weights: tuple[Path, ...]
    stored: torch.dtype


def place_of(model: ModelSection) -> str:
    """How messages name the model."""
    return f"model {model.name} ({model.huggingface_id})"


def adapter_place_of(model: ModelSection) -> str:
    """How messages name the model's adapter."""
    return f"{place_of(model)}, adapter {model.adapter}"


def source_of(model_id: str) -> str:
    """A folder as an absolute path, so that it is found from any working directory; a hub id as it is."""
    folder = Path(model_id).expanduser()
    return os.path.abspath(folder) if os.path.isdir(folder) else model_id


def inspect_config(model: ModelSection) -> ConfigFile:
    """Look at config.json alone.

    Raises:
        ModelError: there is no such model, it cannot be had, or its configuration is not one that may be loaded.
    """
    where, source = place_of(model), source_of(model.huggingface_id)
    check_exists(model.huggingface_id, where)
    if os.path.isdir(source):
        check_links(Path(source), where)
        check_sealed(Path(source), where, weights=False)
    file = fetch(source, "config.json", model.revision, where)
    if fetch(source, "adapter_config.json", model.revision, where, optional=True) is not None:
        raise ModelError(
            "it is an adapter, not a model",
            where=where,
            fix="put its base model in huggingface_id and this one in adapter",
        )
    if file is None:
        raise ModelError("there is no config.json", where=where, expected=_MODEL_FOLDER, fix="check the path")
    content = read_json(file, where)
    ignored: list[str] = []
    if not model.trust_remote_code:
        content = _without(content, "", ignored, where)
    check_numbers(content, where)
    return ConfigFile(source, _commit_of(file) or model.revision, content, tuple(ignored))


def check_files(model: ModelSection, *, needs_weights: bool = True) -> None:
    """Refuse a model by what the names of its files and its config.json tell, within milliseconds and without torch.
    One on the hub is only looked for in the hub's cache, and only where the hub cannot be asked.

    Args:
        needs_weights: refuse a folder without weights; else only one whose weights are not complete.

    Raises:
        ModelError: there is no such model, or it is not a model that may be loaded.
    """
    where, source = place_of(model), source_of(model.huggingface_id)
    if (folder := consolidated_folder(model.huggingface_id)) is not None:  # is converted before it is loaded
        check_consolidated(folder, where)
        return
    check_exists(model.huggingface_id, where)
    if os.path.isdir(source):
        file = inspect_config(model)
        if needs_weights or has_weights(source):
            _weight_files(source, file.revision, where)
    elif constants.HF_HUB_OFFLINE and not _in_cache(source, model.revision, where):
        raise _not_had(_not_here(source), where)


def check_adapter(model: ModelSection) -> None:
    """Refuse an adapter that is not there; one on the hub is looked at when it is loaded.

    Raises:
        ModelError: there is no such folder, or no adapter in it.
    """
    assert model.adapter is not None
    where = adapter_place_of(model)
    check_exists(model.adapter, where)
    if os.path.isdir(source_of(model.adapter)):
        adapter_files(model.adapter, where)


def adapter_files(adapter: str, where: str) -> tuple[Path, Path]:
    """The configuration and the weights of an adapter.

    Raises:
        ModelError: there is no such adapter, or it is not one that peft has saved as safetensors.
    """
    source = source_of(adapter)
    check_exists(adapter, where)
    if os.path.isdir(source):
        check_links(Path(source), where)
        for weights_too in (False, True):
            check_sealed(Path(source), where, weights=weights_too)
    config = fetch(source, "adapter_config.json", None, where)
    if config is None:
        raise ModelError("there is no adapter_config.json", where=where, expected="an adapter that peft has saved")
    weights = fetch(source, "adapter_model.safetensors", None, where)
    if weights is None:
        raise ModelError(
            "there is no adapter_model.safetensors",
            where=where,
            expected="safetensors; a pickle (adapter_model.bin) can run code when it is read",
            fix="if you trust the source, load and save it with peft, which writes safetensors",
        )
    return config, weights


def has_weights(folder: str) -> bool:
    """Whether any file of the folder is one of weights, or a list of such files."""
    return any(
        f.suffix == ".safetensors" or f.name.endswith(".index.json") or _is_pickled(f) for f in Path(folder).iterdir()
    )


def _is_pickled(file: Path) -> bool:
    """Whether a file is one of weights that are pickles, by its name."""
    return file.suffix in _PICKLED and _OF_A_TRAINING.fullmatch(file.name) is None


def _in_cache(source: str, revision: str | None, where: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str)
    except ValueError as error:  # no name that the hub would take
        raise _not_had(first_line(error), where) from error


def inspect_model(model: ModelSection) -> ModelFiles:
    """Look at a model before loading it; its weights are fetched from the hub, and not read.

    Raises:
        ModelError: there is no such model, or it is not a model that may be loaded.
    """
    where, file = place_of(model), inspect_config(model)
    weights = _weight_files(file.source, file.revision, where)
    return ModelFiles(file.source, file.revision, file.config, file.ignored, weights, _stored_dtype(weights, where))


def check_exists(model_id: str, where: str) -> None:
    """Refuse what looks like a path and is none, before it is asked for on the hub."""
    path = os.path.expanduser(model_id)
    if os.path.isdir(path):
        return
    looks_like_path = model_id.startswith((".", "~", os.sep)) or model_id.count("/") > 1 or "\\" in model_id
    if os.path.exists(path) or looks_like_path:
        raise ModelError(
            "the path is a file" if os.path.exists(path) else "there is no such folder",
            where=where,
            expected=f"{_MODEL_FOLDER}, or a hub id like owner/name",
            fix="check the path; it is relative to the folder where strop is started",
        )


def fetch(source: str, name: str, revision: str | None, where: str, optional: bool = False) -> Path | None:
    """One file of the model: from its folder, the hub's cache or the hub; None where a folder has no such file, or
    where an optional one cannot be had.

    Raises:
        ModelError: the file is not optional and the hub does not have it, or cannot be reached while it is not in the
            cache; or the file is a link that leads out of the folder.
    """
    if os.path.isdir(source):
        file = Path(source, name)
        return contained(file, Path(source), where) if os.path.lexists(file) else None
    from transformers.utils import cached_file  # slow to import, and needed for the hub alone

    try:
        found = cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=not optional,
            _raise_exceptions_for_connection_errors=not optional,
        )
    except (OSError, ValueError) as error:
        if optional:
            return None
        raise _not_had(_why_not(source, error), where) from error
    return None if found is None else Path(found)


def copy_files(names: Iterable[str], source: str, revision: str | None, where: str, target: Path) -> None:
    """Copy those of these files that a model has. source: a folder or a hub id."""
    for name in names:
        if (file := fetch(source, name, revision, where, optional=True)) is not None:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)


def _not_had(why: str, where: str) -> ModelError:
    return ModelError(
        why,
        where=where,
        expected="a folder on this machine, or a hub id that can be reached or is in the hub's cache",
        fix="check the name; without a network, download the model elsewhere and give its folder",
    )


def _why_not(source: str, error: Exception) -> str:
    """What kept the hub from giving a file."""
    if not isinstance(error.__cause__, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return first_line(error)
    return _not_here(source)


def _not_here(source: str) -> str:
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} could not be reached"
    return f"there is no folder {source!r} here, and the hub could not be asked for it: {reason}"


def read_json(file: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file, its special floats decoded."""
    try:
        if file.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it has more than {LONGEST_JSON:,} bytes")
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_as_float)
    except (OSError, ValueError, RecursionError) as error:
        fix = "download or copy the file again"
        raise ModelError(f"{file.name} cannot be read: {first_line(error)}", where=where, fix=fix) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} holds no JSON object", where=where, expected="{...}")
    return content


def _as_float(content: dict[str, Any]) -> Any:
    """JSON has no infinities, so transformers writes {"__float__": "Infinity"} in their place."""
    named = content["__float__"] if content.keys() == {"__float__"} else None
    return float(named) if named in _FLOATS else content


def _commit_of(file: Path) -> str | None:
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def _without(config: Mapping[str, Any], path: str, stripped: list[str], where: str) -> dict[str, Any]:
    """config.json without what makes transformers import the model's own code or fetch kernels.

    Keys of transformers' internals and names of kernels are refused: no honest file has them. `auto_map`, which
    natively supported models ship too, is dropped; what stands there is then not used.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}{key}"
        if key in _STRIPPED:
            stripped.append(name)
        elif key in _DROPPED or key.startswith("_"):
            if _names_code(key, value):
                raise ModelError(
                    f"config.json names code to be fetched and run: {name}: {value!r}",
                    where=where,
                    fix="do not use this model unless you trust its source; then remove the key",
                )
            internal = key in _DROPPED or "implementation" in key
            if not internal and key not in _HARMLESS:
                kept[key] = value  # such as _sliding_window_pattern
            elif internal and value is not None and key not in _HARMLESS:
                stripped.append(name)
        elif isinstance(value, Mapping):
            kept[key] = _without(value, f"{name}.", stripped, where)
        else:
            kept[key] = value
    return kept


def _names_code(key: str, value: Any) -> bool:
    """Attention and kernel settings name hub repositories as owner/name; transformers never writes *_internal."""
    if key == "_name_or_path":
        return False
    return (key.endswith("_implementation_internal") and value is not None) or any("/" in t for t in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _weight_files(source: str, revision: str | None, where: str) -> tuple[Path, ...]:
    single = fetch(source, "model.safetensors", revision, where, optional=True)
    if single is not None:
        return (single,)
    index = fetch(source, "model.safetensors.index.json", revision, where, optional=True)
    if index is None:
        raise _no_safetensors(source, revision, where)
    names = read_json(index, where).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelError("model.safetensors.index.json has no weight_map", where=where)
    files = []
    for name in sorted(set(names.values())):
        if not name.endswith(".safetensors") or name != os.path.basename(name) or "\\" in name:
            raise ModelError(f"model.safetensors.index.json names {name!r}, which is no file beside it", where=where)
        file = fetch(source, name, revision, where)
        if file is None:
            raise ModelError(
                f"{name} is missing, which model.safetensors.index.json names",
                where=where,
                fix="download the model again, completely",
            )
        files.append(file)
    return tuple(files)


def _no_safetensors(source: str, revision: str | None, where: str) -> ModelError:
    if os.path.isdir(source):
        pickled = sorted(f.name for f in Path(source).iterdir() if _is_pickled(f))
    else:
        names = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        pickled = [n for n in names if fetch(source, n, revision, where, optional=True) is not None]
    if pickled:
        return ModelError(
            f"its weights are pickles ({pickled[0]}), which can run code when they are read",
            where=where,
            expected="model.safetensors",
            fix="if you trust the source, convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    fetch(source, "model.safetensors", revision, where)  # on the hub: why it could not be had
    return ModelError("there are no weights", where=where, expected="model.safetensors, or an index with its shards")


def _stored_dtype(files: tuple[Path, ...], where: str) -> torch.dtype:
    """The dtype of most weights, read from the files' headers; config.json's `dtype` is only a claim."""
    elements: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    part = tensors.get_slice(key)
                    size = 1
                    for length in part.get_shape():
                        size *= length
                    elements[part.get_dtype()] += size
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"{file.name} is damaged: {first_line(error)}", where=where, fix="download or copy the file again"
            ) from error
    known = [name for name, _ in elements.most_common() if name in STORED]
    if not known:
        raise ModelError(f"{files[0].name} holds no floating point weights", where=where)
    import torch

    dtype: torch.dtype = getattr(torch, STORED[known[0]])
    return dtype
