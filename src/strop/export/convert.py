"""`strop convert`: a transformers folder to `consolidated.00.pth` with `params.json`, and back. Floor 6.

    consolidated   consolidated.00.pth, params.json, tokenizer files
    hf             model.safetensors, or shards with their index; config.json, tokenizer files

Tensors come and go one at a time, none is computed with, and there and back is the same to the bit. params.json has
Meta's keys and, under `hf_config`, config.json as it was; without it (files of Meta's or Mistral's own) the
configuration follows from the keys (`params_json.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from strop.durable import to_json
from strop.errors import ModelError, foreign_errors
from strop.export.consolidated import Consolidated
from strop.export.folders import TOKENIZER_FILES, check_output, check_room, new_folder, templates
from strop.export.layout import DERIVED, EMBEDDING, HEAD, Layout
from strop.export.params_json import layout_of, params_of
from strop.export.pth import write_pth
from strop.export.shards import SINGLE, SafetensorsFile, read_header, write_index
from strop.manifest import seal
from strop.named_models import check_whole
from strop.policy.model.adapter_base import saved_model
from strop.policy.model.configuration import model_config, quiet
from strop.policy.model.consolidated_files import FIRST, PARAMS
from strop.policy.model.folder import GENERATION, copy_files, inspect_model, place_of
from strop.policy.model.shape_check import meta_model
from strop.policy.model.shard_writer import ShardWriter, Spec

log = logging.getLogger("strop")

SMALL_FILES = (*TOKENIZER_FILES, GENERATION)
SHARD_BYTES = 5 * 10**9


def to_consolidated(source: str, target: Path) -> None:
    """A transformers folder, the final model of a run, or a model on the hub, to the consolidated layout.

    Raises:
        ModelError: it is none of these families, or not whole.
        SaveError, CheckpointError: the folder cannot be written.
    """
    model = saved_model(source)
    check_whole(model, source)
    files, config, where = inspect_model(model), model_config(model), place_of(model)
    layout = layout_of(config, where)
    if files.config.get("quantization_config"):
        raise ModelError(
            "its weights are quantised (quantization_config in config.json), which this layout has no place for",
            where=where,
            expected="16 or 32 bits",
            fix="convert the model it was made from",
        )
    check_output(target, (files.source,))
    shards = [read_header(path) for path in files.weights]
    own = {name: spec for shard in shards for name, spec in shard.specs.items() if not name.endswith(DERIVED)}
    with _named(where):
        specs = {layout.consolidated_name(name): spec for name, spec in own.items()}
    _check_whole(config, own, where)
    if config.tie_word_embeddings:
        specs[HEAD] = specs[EMBEDDING]  # readers of this layout expect a head
    check_room(target, sum(spec.nbytes for spec in specs.values()))
    with new_folder(target) as folder, _named(where):
        write_pth(folder / FIRST, specs, _as_consolidated(shards, specs, layout))
        (folder / PARAMS).write_text(to_json(params_of(config, files.config), indent=2), encoding="utf-8")
        small = (*SMALL_FILES, *templates(files.source, files.revision))
        copy_files(small, files.source, files.revision, where, folder)
    _tell_tokenizer(target, where)


def _as_consolidated(
    shards: Sequence[SafetensorsFile], specs: Mapping[str, Spec], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order of `specs`: that of the shards, and at the end the head of a tied model."""
    written: set[str] = set()
    embedding: tuple[SafetensorsFile, str] | None = None
    for shard in shards:
        for name, tensor in shard.tensors([name for name in shard.specs if not name.endswith(DERIVED)]):
            theirs = layout.consolidated_name(name)
            written.add(theirs)
            if theirs == EMBEDDING:
                embedding = shard, name
            yield theirs, layout.to_consolidated(theirs, tensor)
    if HEAD in specs.keys() - written:
        assert embedding is not None
        shard, name = embedding
        yield from ((HEAD, tensor) for _, tensor in shard.tensors([name]))


def to_transformers(source: str, target: Path) -> None:
    """A folder with `consolidated.NN.pth` and `params.json` to one that transformers loads.

    Raises:
        ModelError: a file is missing, damaged or holds code; it is none of these families, or not whole.
        SaveError, CheckpointError: the folder cannot be written.
    """
    found = Consolidated.open(Path(source).expanduser())
    check_output(target, (source,))
    config, layout = found.config, found.layout
    with _named(found.where):
        names = {layout.transformers_name(name): name for name in found.specs}
    specs = {name: found.specs[theirs] for name, theirs in names.items()}
    if config.tie_word_embeddings:
        specs.pop("lm_head.weight", None)
    _check_whole(config, specs, found.where)
    check_room(target, sum(spec.nbytes for spec in specs.values()))
    with new_folder(target) as folder, _named(found.where):
        config.save_pretrained(folder)
        parts = _shards(specs)
        for file, part in parts.items():
            with ShardWriter(folder / file, part, {}) as writer:
                for name in part:
                    writer.write(name, layout.to_transformers(names[name], found.tensor(names[name])))
        write_index(folder, parts)
        small = (*SMALL_FILES, *templates(str(found.folder)))
        copy_files(small, str(found.folder), None, found.where, folder)
        seal(folder, 0, {})
    _tell_tokenizer(target, found.where)


def _tell_tokenizer(target: Path, where: str) -> None:
    if not any((target / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        log.warning("%s: there is no tokenizer to copy; add the model's own to %s", where, target)


def _shards(specs: Mapping[str, Spec]) -> dict[str, dict[str, Spec]]:
    """Files of at most `SHARD_BYTES`, but for a tensor that is larger: names of files -> their tensors."""
    parts: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if parts[-1] and sum(s.nbytes for s in parts[-1].values()) + spec.nbytes > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = spec
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _check_whole(config: PreTrainedConfig, specs: Mapping[str, Spec], where: str) -> None:
    """Every weight that the configuration describes is there, in its shape, and no other.

    Args:
        specs: by transformers' names.

    Raises:
        ModelError: names the first that is not; or the configuration builds no model.
    """
    with foreign_errors(lambda why: ModelError(f"its configuration builds no model: {why}", where=where)), quiet():
        module = meta_model(config, trust_remote_code=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    there = {name: spec.shape for name, spec in specs.items() if name in wanted or not config.tie_word_embeddings}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise ModelError(
                f"{name}: {_shape(there.get(name))}",
                where=where,
                expected=f"{_shape(wanted.get(name))}, as the configuration says",
                fix="use the configuration and all files of one and the same model",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Add to the error which model it is of, where it does not say."""
    try:
        yield
    except ModelError as error:
        raise ModelError(error.found, where=error.where or where, expected=error.expected, fix=error.fix) from error
