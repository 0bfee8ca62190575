"""Writes a policy to a folder that loads with plain peft or transformers. Floor 2."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from strop.policy.model.adapter_init import save_on_base
from strop.policy.model.adapters import check_adapter
from strop.policy.model.configuration import quiet
from strop.policy.model.end_tokens import write_generation
from strop.policy.model.folder import PROCESSOR_FILES, copy_files
from strop.policy.model.shard_writer import IN_FILES, ShardWriter, Spec
from strop.readable import short_name

if TYPE_CHECKING:
    from strop.policy.policy import Policy

logger = logging.getLogger("strop")

MAX_FILE = "50GB"
"""Size of a file of weights, at most, as transformers has it."""


def save(
    policy: Policy, folder: Path, tokenizer: PreTrainedTokenizerBase, ends: Mapping[int, float] | None = None
) -> None:
    """Does the work of `Policy.save_pretrained`.

    Raises:
        ModelError: peft cannot load the adapter that was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if isinstance(policy.model, PeftModel):
            _save_adapter(policy, policy.model, folder)
        else:
            _save_full(policy, folder)
            _copy_processor(policy, folder)
        own = getattr(policy.base, "generation_config", None)
        write_generation(folder, own, tokenizer, None if ends is None else dict(ends), policy.where)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Does the work of `Policy.save_adapter`."""
    assert isinstance(policy.model, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        _save_adapter(policy, policy.model, folder)


def help_to_save(policy: Policy) -> None:
    """What every other process does while rank 0 calls `save`: it gives it its parts of the weights, in the order in
    which rank 0 writes them."""
    if isinstance(policy.model, PeftModel):
        parts = [_kept(policy)]
        dtype = None
    else:
        dtype = _saving_dtype(policy)
        written = _written(policy.base)
        parts = [_kept(policy)] if written is None else list(_files(written, dtype).values())
    for tensors in parts:
        for _ in policy.strategy.whole(tensors, dtype):
            pass


def _kept(policy: Policy) -> dict[str, Tensor]:
    """What is saved, by name in the module. Of names that share a tensor, as tied weights do, the first stands."""
    if isinstance(policy.model, PeftModel):
        return dict(policy.trainable_in_module())
    return {names[0]: tensor for tensor, names in _by_tensor(policy.base.state_dict(keep_vars=True))}


def _by_tensor(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, list[str]]]:
    """Each tensor with its names."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [(tensors[own[0]], own) for own in names.values()]


def _save_adapter(policy: Policy, adapted: PeftModel, folder: Path) -> None:
    tensors = {**adapted.state_dict(), **dict(policy.strategy.whole(_kept(policy)))}
    trained = get_peft_model_state_dict(adapted, state_dict=tensors, save_embedding_layers=False)
    if policy.initial_adapter is None:
        adapted.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty template of a model card
    else:
        trained = save_on_base(adapted, trained, policy.initial_adapter, folder)
    reward_model = policy.is_reward_model
    check_adapter(trained, folder, policy.loaded_config, policy.where, reward_model=reward_model)


def _save_full(policy: Policy, folder: Path) -> None:
    dtype = _saving_dtype(policy)
    written = _written(policy.base)
    if written is None:
        _save_converted(policy, folder, dtype)
    else:
        policy.loaded_config.architectures = [type(policy.base).__name__]
        _write(policy, folder, _files(written, dtype), dtype)
    policy.loaded_config.dtype = short_name(dtype)
    policy.loaded_config.save_pretrained(folder)


def _copy_processor(policy: Policy, folder: Path) -> None:
    """Copies what a model of several senses reads images and sound by: without it, servers do not load the model."""
    config = policy.loaded_config
    if config.get_text_config() is not config:
        copy_files(PROCESSOR_FILES, policy.base.name_or_path, None, policy.where, folder)


def _written(base: PreTrainedModel) -> dict[str, Tensor] | None:
    """The tensors of a model by their names in its files, tied ones once; None where transformers has to put those of
    the files together."""
    converted = getattr(base, "_weight_conversions", None) != []  # None: it was not loaded by transformers
    has_code = not type(base).__module__.startswith("transformers.")
    if converted or has_code or getattr(base, "_keys_to_ignore_on_save", None):
        return None
    follows = getattr(base, "all_tied_weights_keys", None) or {}
    found = {}
    for tensor, names in _by_tensor(base.state_dict(keep_vars=True)):
        own = [name for name in names if name not in follows]
        if len(own) != 1:
            return None
        found[own[0]] = tensor
    return found


def _files(written: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Names of files, as transformers names and fills them, with the tensors of each, in the order in which safetensors
    has them.

    dtype: what floating point tensors are saved in.
    """
    ordered = sorted(
        written, key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
    )
    outline = {n: torch.empty(written[n].shape, dtype=_stored(written[n], dtype), device="meta") for n in ordered}
    split = split_torch_state_dict_into_shards(outline, max_shard_size=MAX_FILE)

    def place(name: str) -> tuple[int, str]:
        return IN_FILES.index(outline[name].dtype), name

    files = split.filename_to_tensors
    return {file: {name: written[name] for name in sorted(names, key=place)} for file, names in files.items()}


def _stored(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _write(policy: Policy, folder: Path, files: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
    """Writes the weights one tensor at a time, so that no more of them is whole in memory."""
    for file, tensors in files.items():
        specs = {name: Spec(tuple(tensor.shape), _stored(tensor, dtype)) for name, tensor in tensors.items()}
        with ShardWriter(folder / file, specs, {}) as writer:
            for name, tensor in policy.strategy.whole(tensors, dtype):
                writer.write(name, tensor)
    if len(files) > 1:
        sizes = [math.prod(t.shape) * _stored(t, dtype).itemsize for some in files.values() for t in some.values()]
        total = {"total_parameters": policy.base.num_parameters(), "total_size": sum(sizes)}
        index = {"metadata": total, "weight_map": {name: file for file, some in files.items() for name in some}}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _save_converted(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Saves by transformers, which makes the tensors of the files of all those of the model at once."""
    base = policy.base
    training_config, base.config = base.config, policy.loaded_config
    generation = getattr(base, "generation_config", None)
    if generation is not None:  # it is written by `write_generation`
        base.generation_config = GenerationConfig()
    try:
        made = dict(policy.strategy.whole(_kept(policy), dtype))
        named = _by_tensor(base.state_dict(keep_vars=True))
        base.save_pretrained(folder, state_dict={name: made[names[0]] for _, names in named for name in names})
    finally:
        base.config = training_config
        if generation is not None:
            base.generation_config = generation


def _may_be_too_large(policy: Policy) -> bool:
    return policy.saved_dtype == torch.float16 and not policy.has_adapters


def _saving_dtype(policy: Policy) -> torch.dtype:
    """`saved_dtype`, or float32 if a weight is too large for float16. The same in all processes."""
    if not _may_be_too_large(policy):
        return policy.saved_dtype
    most = torch.finfo(torch.float16).max
    weights = {name: weight for name, weight in _kept(policy).items() if weight.is_floating_point()}
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights.values()]
    too_large = [bool(part.numel()) and float(part.detach().abs().max()) > most for part in own]
    counts = policy.strategy.world.sum([int(flag) for flag in too_large])
    large = [name for name, count in zip(weights, counts, strict=True) if count]
    if not large:
        return torch.float16
    logger.warning("%s: saved in float32, since the weights of %s are too large for float16", policy.where, large[0])
    return torch.float32
