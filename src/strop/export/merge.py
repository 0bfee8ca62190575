"""`strop merge`: an adapter into its base, as one model that proves to be the model with its adapter. Floor 6.

    the small files      configuration, tokenizer, generation settings
    the adapter's model  in memory, in float32 where that fits; what it answers is kept
    merged weights       by peft, one layer at a time, in float32
    new files            shard by shard: merged weights rounded once to the dtype of the base's, others copied
    the merged model     loaded from the new files by plain transformers, and compared

The folder gets its name after that. Where the two models differ by more than rounding, it never does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from strop.config.sections import ModelSection
from strop.errors import ModelError, foreign_errors
from strop.export.converted_bases import in_transformers
from strop.export.folders import check_output, check_room, copy_tokenizer, new_folder
from strop.export.merged_weights import effective, in_files, linear_products, merged_weights, parted_head, stored_head
from strop.export.proof import (
    PROMPTS,
    Answers,
    Line,
    Proof,
    compare_answers,
    compare_layers,
    distance,
    encode,
    greedy,
    logits_of,
    move_weights,
    refuse,
)
from strop.export.shards import (
    SafetensorsFile,
    memory_dtype,
    num_weights,
    quantised_part,
    read_header,
    rewrite,
    write_index,
)
from strop.manifest import seal
from strop.policy.model.adapter_base import adapter_of, is_of_reward_model
from strop.policy.model.adapter_targets import head_names
from strop.policy.model.adapters import with_adapter
from strop.policy.model.configuration import model_config, quiet
from strop.policy.model.folder import ModelFiles, adapter_place_of, inspect_model, source_of
from strop.policy.model.load import LoadedModel, load_model
from strop.policy.model.model_hashes import weights_hash
from strop.policy.model.quantised_base import dequantise
from strop.policy.model.task import WRITING_HEADS, is_reward_model, padding_id
from strop.policy.model.tokenizer import check_model, check_vocabulary, read_tokenizer
from strop.readable import short_name

log = logging.getLogger("strop")

PROOF = "merge-proof.md"
WARN_SHARE = 0.25
"""A merge that moves logits by more than this share of what the adapter does has rounded too much of it away."""


@dataclass(frozen=True, slots=True)
class Merged:
    """An adapter's model after it was merged in memory.

    weights: those that the adapter changed, by their names in the base's files. head: a head that the files lack, of a
    reward model whose base is a language model, or of a model that shared it with the embedding, where the adapter made
    the two differ; else empty. parted: whether it made them differ. products, answers: of the model with its adapter.
    moved: how far the adapter moves logits. made_from: a hash of base and adapter."""

    loaded: LoadedModel
    weights: dict[str, Tensor]
    head: Mapping[str, Tensor]
    parted: bool
    products: dict[str, tuple[Tensor, Tensor]]
    answers: Answers
    moved: float
    made_from: str


def merge(
    source: str,
    target: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    proof: bool = False,
) -> Proof:
    """Merge an adapter into its base, and prove it.

    Args:
        source: a run folder, or an adapter.
        target: is made; must not be there yet, or be empty.
        base: the adapter's base, in transformers' layout or a consolidated one; None: as it says itself.
        dtype: of the merged model's files; None: that of the base's, tensor by tensor.
        proof: write the table into the folder, too.

    Raises:
        ModelError: they cannot be merged, or the merged model is not the adapter's; nothing is written then.
        SaveError, CheckpointError: the folder cannot be written.
    """
    model = adapter_of(source, None if base is None else in_transformers(base))
    assert model.adapter is not None
    where = adapter_place_of(model)
    files = inspect_model(model)
    check_output(target, (files.source, source_of(model.adapter), source))
    shards = [read_header(path) for path in files.weights]
    check_room(target, _bytes(shards, dtype or files.stored, dtype is None, model_config(model)))
    stored = dtype or files.stored
    with new_folder(target) as folder:
        copy_tokenizer(model, folder)
        made = _merged(model, files, shards, folder, where)
        _write(made, shards, folder, dtype, files.stored)
        found = _prove(made, folder, stored)
        refuse(found, where)
        if proof:
            (folder / PROOF).write_text(f"# {where}\n\n{found.table()}", encoding="utf-8")
        seal(folder, 0, {"merged_from": made.made_from})
    if found.rounded > WARN_SHARE * found.moved:
        log.warning(
            "%s: %s rounds much of the adapter away: it moves logits by %.2g, rounding %.2g; --dtype float32 keeps it",
            where,
            short_name(stored),
            found.moved,
            found.rounded,
        )
    return found


def _bytes(shards: Sequence[SafetensorsFile], usual: torch.dtype, kept: bool, config: PreTrainedConfig) -> int:
    """Of all weights of the merged model, at most. usual: dtype of its files; kept: what is not quantised stays in its
    own. A head that is the embedding may get weights of its own."""
    specs, total = {name: spec for shard in shards for name, spec in shard.specs.items()}, 0
    counts = num_weights(shards)
    for name, count in counts.items():
        own = specs[name].dtype
        total += count * (own.itemsize if kept and own.is_floating_point else max(own.itemsize, usual.itemsize))
    if any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())):
        total += max(count for name, count in counts.items() if len(specs[name].shape) == 2) * usual.itemsize
    return total


def _merged(
    model: ModelSection, files: ModelFiles, shards: Sequence[SafetensorsFile], folder: Path, where: str
) -> Merged:
    """Load the adapter's model, note what it answers, and merge it in memory. folder: has the tokenizer, and gets the
    configuration."""
    assert model.adapter is not None
    judges = is_of_reward_model(model.adapter, where)
    loaded = load_model(model, dtype=memory_dtype(shards, files.stored), reward_model=judges)
    module = loaded.module
    opened = dequantise(module, torch.float32)  # an adapter is right on the numbers that it was trained on
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings()
    was_tied = head is not None and head.weight is embedding
    loaded.config.dtype = files.stored
    if hasattr(loaded.config, "quantization_config"):  # of the files; those of the merged model are not quantised
        del loaded.config.quantization_config
    if judges:
        loaded.config.architectures = [type(module).__name__]
        loaded.config.get_text_config().pad_token_id = padding_id(read_tokenizer(model))
    loaded.config.save_pretrained(folder)
    tokenizer = _tokenizer(folder, judges=judges, needs_weights=False)
    check_vocabulary(tokenizer, module, where)
    names = {name for shard in shards for name in shard.specs}
    adapted = with_adapter(module, model)
    log.info("%s: asking it %d prompts", where, len(PROMPTS))
    asked = _asked(tokenizer, embedding.shape[0])
    texts = greedy(adapted, asked)
    answers = Answers(texts, logits_of(adapted, asked, texts))
    with quiet(), adapted.disable_adapter():
        moved = distance(answers.logits, logits_of(adapted, asked, texts))
    products, digest = linear_products(adapted), weights_hash(adapted)
    log.info("%s: merging", where)
    weights = {f"{name}.weight": module.get_submodule(name).weight.detach() for name in opened}
    weights |= merged_weights(adapted, where)
    parted = parted_head(adapted, was_tied)
    head_name = f"{(head_names(module) or ['lm_head'])[0]}.weight"
    added = {}
    if was_tied:
        weights.pop(head_name, None)
        own = effective(module.get_output_embeddings())
        if stored_head(module, head_name, own, names, where):  # some files hold the shared weights twice
            weights[head_name] = own
        elif parted is not None:
            added = {head_name: parted}
    if judges and head_name not in names:  # its base is a language model
        added = {head_name: weights.pop(head_name)}
    placed = in_files(adapted.get_base_model(), weights, names, where)
    return Merged(loaded, placed, added, parted is not None, products, answers, moved, digest)


def _tokenizer(folder: Path, *, judges: bool, needs_weights: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of the merged model, which may be a reward model (judges)."""
    section = ModelSection(huggingface_id=str(folder), name="merged")
    tokenizer = read_tokenizer(section, needs_weights=needs_weights)
    check_model(section, tokenizer, needs_weights=needs_weights, reward_model=judges)
    return tokenizer


def _asked(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[list[int]]:
    """The prompts of the proof as tokens. rows: of the embedding."""
    with foreign_errors(lambda why: ModelError(f"a prompt cannot be written by its chat template: {why}")):
        return encode(tokenizer, PROMPTS, rows)


def _write(
    made: Merged, shards: Sequence[SafetensorsFile], folder: Path, dtype: torch.dtype | None, usual: torch.dtype
) -> None:
    """The base's files with merged weights in them, and the configuration that belongs to them. usual: dtype of what
    was quantised, where `dtype` says nothing."""
    config, judges = made.loaded.config, is_reward_model(made.loaded.module)
    if made.parted:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        log.info(
            "the head and the embedding shared their weights; the adapter made them differ, so each has its own now"
        )
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    files, names = {}, {name for shard in shards for name in shard.specs}

    def left_out(name: str) -> bool:
        return quantised_part(name, names) or (judges and name.startswith(WRITING_HEADS))

    for number, shard in enumerate(shards):
        added = made.head if number == 0 else {}
        target = folder / shard.path.name
        files[shard.path.name] = rewrite(shard, target, made.weights, added, dtype, usual=usual, left_out=left_out)
    write_index(folder, files)


def _prove(made: Merged, folder: Path, stored: torch.dtype) -> Proof:
    """Load what was written, and compare it with the adapter's model."""
    compute, judges = made.loaded.module.dtype, is_reward_model(made.loaded.module)
    made.weights.clear()
    nn.Module.to(made.loaded.module, "meta")  # its memory is the merged model's now
    section = ModelSection(huggingface_id=str(folder), name="merged")
    merged = load_model(section, dtype=compute, reward_model=judges).module.eval()
    tokenizer = _tokenizer(folder, judges=judges)
    asked = _asked(tokenizer, merged.get_input_embeddings().weight.shape[0])
    log.info("comparing the merged model with the adapter's")
    coarser = max((stored, compute), key=lambda kind: torch.finfo(kind).eps)
    lines: list[Line] = list(compare_layers(merged, made.products, coarser))
    answers = Answers(greedy(merged, asked), logits_of(merged, asked, made.answers.texts))
    move_weights(merged, coarser)
    lines += compare_answers(made.answers, answers, logits_of(merged, asked, made.answers.texts))
    return Proof(lines, made.moved, distance(made.answers.logits, answers.logits))
