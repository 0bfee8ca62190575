"""Writes a policy to a folder that loads with plain peft or transformers. Floor 2."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from strop.policy.model.adapter_init import save_on_base
from strop.policy.model.adapters import check_adapter
from strop.policy.model.configuration import quiet
from strop.policy.model.generation import write_generation
from strop.readable import short_name

if TYPE_CHECKING:
    from strop.policy.policy import Policy

logger = logging.getLogger("strop")


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
        own = getattr(policy.base, "generation_config", None)
        write_generation(folder, own, tokenizer, None if ends is None else dict(ends), policy.where)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Does the work of `Policy.save_adapter`."""
    assert isinstance(policy.model, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        _save_adapter(policy, policy.model, folder)


def help_to_save(policy: Policy) -> None:
    """What every other process does while rank 0 calls `save`: it gives it its parts of the weights."""
    for _ in range(2 if _may_be_too_large(policy) else 1):
        for _ in policy.strategy.whole(_kept(policy)):
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
    base, dtype = policy.base, _saving_dtype(policy)
    training_config, base.config = base.config, policy.loaded_config
    generation = getattr(base, "generation_config", None)
    if generation is not None:  # it is written by `write_generation`
        base.generation_config = GenerationConfig()
    try:
        base.save_pretrained(folder, state_dict=_in_dtype(policy, dtype))
        policy.loaded_config.dtype = short_name(dtype)
        policy.loaded_config.save_pretrained(folder)
    finally:
        base.config = training_config
        if generation is not None:
            base.generation_config = generation


def _in_dtype(policy: Policy, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the base, with floating point ones in another dtype. Names that share a tensor still share one."""
    made = {
        name: own.to(dtype) if own.is_floating_point() else own for name, own in policy.strategy.whole(_kept(policy))
    }
    named = _by_tensor(policy.base.state_dict(keep_vars=True))
    return {name: made[names[0]] for _, names in named for name in names}


def _may_be_too_large(policy: Policy) -> bool:
    return policy.saved_dtype == torch.float16 and not policy.has_adapters


def _saving_dtype(policy: Policy) -> torch.dtype:
    """`saved_dtype`, or float32 if a weight is too large for float16."""
    if not _may_be_too_large(policy):
        return policy.saved_dtype
    most, large = torch.finfo(torch.float16).max, []
    for name, tensor in policy.strategy.whole(_kept(policy)):
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > most:
            large.append(name)
    if not large:
        return torch.float16
    logger.warning("%s: saved in float32, since the weights of %s are too large for float16", policy.where, large[0])
    return torch.float32
