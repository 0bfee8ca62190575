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
from strop.policy.precision import short_name

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
            if policy.initial_adapter is None:
                policy.model.save_pretrained(str(folder), save_embedding_layers=False)
                (folder / "README.md").unlink(missing_ok=True)  # peft's empty template of a model card
                trained = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
            else:
                trained = save_on_base(policy.model, policy.initial_adapter, folder)
            reward_model = policy.is_reward_model
            check_adapter(trained, folder, policy.loaded_config, policy.where, reward_model=reward_model)
        else:
            _save_full(policy, folder)
        own = getattr(policy.base, "generation_config", None)
        write_generation(folder, own, tokenizer, None if ends is None else dict(ends), policy.where)


def _save_full(policy: Policy, folder: Path) -> None:
    base, dtype = policy.base, _saving_dtype(policy)
    training_config, base.config = base.config, policy.loaded_config
    generation = getattr(base, "generation_config", None)
    if generation is not None:  # it is written by `write_generation`
        base.generation_config = GenerationConfig()
    try:
        base.save_pretrained(folder, state_dict=_in_dtype(base.state_dict(keep_vars=True), dtype))
        policy.loaded_config.dtype = short_name(dtype)
        policy.loaded_config.save_pretrained(folder)
    finally:
        base.config = training_config
        if generation is not None:
            base.generation_config = generation


def _in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, with floating point ones in another dtype. Names that share a tensor, as tied weights do, still
    share one."""
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            own = tensor.detach()
            made[id(tensor)] = own.to(dtype) if own.is_floating_point() else own
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def _saving_dtype(policy: Policy) -> torch.dtype:
    """`saved_dtype`, or float32 if a weight is too large for float16."""
    if policy.saved_dtype != torch.float16:
        return policy.saved_dtype
    most = torch.finfo(torch.float16).max
    large = [n for n, p in policy.base.named_parameters() if p.numel() and float(p.detach().abs().max()) > most]
    if not large:
        return torch.float16
    logger.warning("%s: saved in float32, since the weights of %s are too large for float16", policy.where, large[0])
    return torch.float32
