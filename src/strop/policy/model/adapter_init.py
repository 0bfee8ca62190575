"""How new adapters begin, and what that means for the base and for the saved adapter. Floor 2.

    true, gaussian   A is random and B is 0: the model is its base until the first step
    pissa, olora     A and B hold a part of the weight, which the base loses: W = W' + s B0 A0. The model computes what
                     its base computes, but for rounding, and the frozen base W' is no longer the one in the files

pissa (arXiv 2404.02948) takes the largest singular values of W, olora (arXiv 2406.01775) the first columns of its QR
decomposition. The reference is the whole model before the first step, so it needs no care. A saved adapter does:
whoever loads it has W. There, W' + s B A = W + s (B A - B0 A0), an adapter of twice the rank: [B, -B0] [A; A0]. peft
documents this conversion (`path_initial_model_for_weight_conversion`) and leaves out whatever else was trained, so it
is done here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from strop.config.sections import LoraSection

Initial = Mapping[str, Tensor]
"""A0 and B0 on the CPU, by the names under which they are saved."""


def initial_adapter(adapted: PeftModel, lora: LoraSection) -> Initial | None:
    """What new adapters begin with, where the base lost it; None: the base is as its files have it."""
    if not lora.moves_base:
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in _saved(adapted).items() if _is_matrix(name)}


def save_on_base(
    adapted: PeftModel, trained: Mapping[str, Tensor], initial: Initial, folder: Path
) -> dict[str, Tensor]:
    """Write the adapter into `folder` as peft does, for the base as its files have it; its tensors as written.

    Args:
        trained: the adapter's whole tensors, by the names under which peft saves them.
        initial: as `initial_adapter` returned it.
    """
    written = {name: _beside(name, tensor.detach().cpu(), initial) for name, tensor in trained.items()}
    config: LoraConfig = copy.deepcopy(adapted.peft_config["default"])
    config.init_lora_weights, config.inference_mode = True, True
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays what it was
    config.r *= 2
    config.save_pretrained(str(folder))
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return written


def _saved(adapted: PeftModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return found


def _is_matrix(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _beside(name: str, tensor: Tensor, initial: Initial) -> Tensor:
    """A above A0, B beside -B0; any other tensor as it is."""
    if not _is_matrix(name):
        return tensor.contiguous()
    before = initial[name].to(tensor.dtype)
    return torch.cat([tensor, before]) if ".lora_A." in name else torch.cat([tensor, -before], dim=1)
