"""Bases whose frozen linear layers lie in 4 or 8 bits (bitsandbytes, torchao). Floor 2.

A layer keeps its weight quantised and dequantises it for each product, forward and backward; all rows are multiplied by
the same numbers, so how a step is cut changes nothing. Embeddings, the head and norms are not quantised. Adapters on
top train as on any frozen base (QLoRA, arXiv 2305.14314), and the reference is the same quantised model without them.

What the packages do otherwise is switched off here:

    4 bits on a CPU   outside of training it packs a weight anew for another product, which has no gradient
    8 bits            it rounds what comes in, too, and takes large columns of a batch apart, so that a row's result
                      depends on the rows beside it
    torchao           it multiplies by the bytes and scales the result, which rounds otherwise than a whole weight
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strop.errors import ModelError
from strop.policy.kernels.quantised_weights import (
    DequantisingForward,
    is_in_bytes,
    is_of_torchao,
    is_quantised,
    quantised_weight,
)
from strop.policy.model.quantisation_settings import BITSANDBYTES, Quantisation
from strop.policy.model.task import head_of
from strop.readable import short_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("strop")

LEAST = 0.5
"""Share of the weights beside embedding and head that has to be quantised: less is not what was asked for."""


def loading(found: Quantisation | None, dtype: torch.dtype, *, sharded: bool = False) -> dict[str, Any]:
    """What `from_pretrained` is given to quantise a model as it reads it, or to read a quantised one.

    Args:
        dtype: what its layers compute in, where nothing else is asked for.
        sharded: the weights will be sharded. Their 4 bits then lie in tensors of the dtype that layers are gathered in,
            since tensors of another dtype would be cast.
    """
    if found is None:
        return {}
    if found.stored:
        return {"device_map": {"": "cpu"}}
    from transformers import BitsAndBytesConfig  # slow to import, and needed here alone

    if found.bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=found.kind,
            bnb_4bit_use_double_quant=found.double,
            bnb_4bit_compute_dtype=dtype if found.compute == "auto" else getattr(torch, found.compute),
            bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
        )
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def check_shardable(found: Quantisation | None, where: str) -> None:
    """Refuse what cannot be sharded over several processes.

    Raises:
        ModelError: it is in 8 bits, whose scales belong to whole weights, or quantised in its files, as bytes.
    """
    if found is None or (found.bits == 4 and not found.stored):
        return
    raise ModelError(
        f"its weights are {found.describe()}, and gpu.fsdp shards a base that is quantised to 4 bits when it is loaded",
        where=where,
        expected="quant: 4bit of a model in 16 or 32 bits, or a base that is not quantised",
        fix="name the model it was made from, in 16 or 32 bits, with quant: 4bit; or leave gpu.fsdp out",
    )


def packed_names(module: nn.Module) -> set[str]:
    """Names of the quantised weights, whose tensors hold packed bits and not the numbers that they stand for."""
    return {f"{name}.weight" for name, part in module.named_modules() if is_quantised(part)}


def compute_in(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Let a model whose files are in 4 bits multiply in the dtype of the run, whatever it was saved with."""
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method", BITSANDBYTES) == BITSANDBYTES:
        config.quantization_config = {**settings, "bnb_4bit_compute_dtype": short_name(dtype)}


def settle(module: PreTrainedModel, found: Quantisation | None, where: str) -> None:
    """Make the quantised layers of a loaded model compute as the head of this file says.

    Raises:
        ModelError: most of the model was not quantised.
    """
    if found is None:
        return
    layers: list[Any] = [part for part in module.modules() if is_quantised(part)]
    done = sum(num_weights(layer) for layer in layers)
    ends = (module.get_input_embeddings(), head_of(module))
    apart = {id(weight) for part in ends if part is not None for weight in part.parameters()}
    apart |= {id(layer.weight) for layer in layers}
    left = sum(p.numel() for p in module.parameters() if p.is_floating_point() and id(p) not in apart)
    share = done / max(1, done + left)
    logger.info("%s: %s, %.1f %% of the weights beside embedding and head", where, found.describe(), 100 * share)
    if share < LEAST:
        raise ModelError(
            f"{found.package} quantised {100 * share:.1f} % of its weights beside embedding and head",
            where=where,
            expected=f"at least {100 * LEAST:.0f} %; it does not reach fused experts",
            fix="leave quant out, or choose a model whose layers are linear layers",
        )
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if is_in_bytes(layer):
            vars(layer)["forward"] = DequantisingForward(layer)


def plain_parts(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that a weight lies in, by name. name: of one whose numbers are not those of its dtype."""
    if is_of_torchao(weight):
        parts, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
        return {f"{name}.{part}": getattr(weight, part) for part in parts}
    return {name: weight.view(torch.uint8).reshape(-1, 1) if weight.ndim == 2 else weight}


def num_weights(layer: nn.Module) -> int:
    """Of a linear layer, however they are stored."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def total_weights(module: nn.Module) -> int:
    """Of a model, however they are stored."""
    quantised = [part for part in module.modules() if is_quantised(part)]
    packed = {id(layer.weight) for layer in quantised}
    others = sum(p.numel() for p in module.parameters() if id(p) not in packed)
    return others + sum(map(num_weights, quantised))


def dense(layer: nn.Module) -> Tensor:
    """[O, I] float32: the weight that a quantised layer multiplies by."""
    return quantised_weight(layer, torch.float32).whole()


def dequantise(module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Give every quantised layer its weight back as a plain one, in place; their full names."""
    names = [name for name, part in module.named_modules() if is_quantised(part)]
    for name in names:
        parent, _, last = name.rpartition(".")
        holder = module.get_submodule(parent)
        layer: Any = getattr(holder, last)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(dense(layer).to(dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
        setattr(holder, last, plain)
    # how transformers read quantised weights from the files, which it has no way back from
    steps = getattr(module, "_weight_conversions", None) or []
    kept = [step for step in steps if not any(map(_of_quantised, getattr(step, "operations", ())))]
    if len(kept) < len(steps):
        vars(module)["_weight_conversions"] = kept or None
    return names


def _of_quantised(operation: object) -> bool:
    return type(operation).__module__ in ("transformers.integrations.bitsandbytes", "transformers.integrations.torchao")
