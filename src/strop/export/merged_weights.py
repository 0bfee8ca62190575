"""An adapter on its base, and the weights of the two as one. Floor 6.

The arithmetic is peft's, on weights in float32, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from strop.errors import ModelError, foreign_errors

ADAPTER = "default"


def adapted_layers(adapted: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Full names in the base, and the layers with adapters; one with several adapted weights comes once for each."""
    for name, part in adapted.get_base_model().named_modules():
        if isinstance(part, BaseTunerLayer):
            yield plain_name(name), part


def linear_products(adapted: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """What every adapted linear layer makes of four random rows: full name -> rows and results, both on the CPU."""
    found, random = {}, torch.Generator().manual_seed(0)
    for name, layer in adapted_layers(adapted):
        base = layer.get_base_layer()  # type: ignore[operator]
        if not isinstance(base, nn.Linear | Conv1D):
            continue
        width = base.weight.shape[0] if isinstance(base, Conv1D) else base.weight.shape[1]
        rows = torch.randn(4, width, generator=random)
        with torch.no_grad():
            found[name] = rows, layer(rows.to(base.weight)).float().cpu()
    return found


def plain_name(name: str) -> str:
    """A name in the base as it is without adapters around its layers."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "token_adapter"))


def merged_weights(adapted: PeftModel, where: str) -> dict[str, Tensor]:
    """Every weight that the adapter changes, by its name in the module. The adapter is merged in place; a layer is in
    float32 while it is merged.

    Raises:
        ModelError: peft cannot merge it.
    """
    base, changed = adapted.get_base_model(), {}
    _part_tied(base)
    for name, layer in adapted_layers(adapted):
        inner = _innermost(layer)
        before = {key: weight.dtype for key, weight in inner.named_parameters(recurse=False)}
        with foreign_errors(lambda why, at=name: ModelError(f"peft cannot merge {at}: {why}", where=where)):  # type: ignore[misc]
            _merge(layer, inner)
        for key, weight in inner.named_parameters(recurse=False):
            weight.data = weight.data.to(before[key])
            changed[f"{name}.{key}"] = weight.detach()
    for name, part in base.named_modules():
        if isinstance(part, ModulesToSaveWrapper):
            for key, weight in part.modules_to_save[ADAPTER].named_parameters():
                changed[f"{name}.{key}"] = weight.detach()
    if adapted.peft_config[ADAPTER].bias != "none":
        biases = {plain_name(name): weight for name, weight in base.named_parameters() if name.endswith(".bias")}
        not_here = (".lora_", ".modules_to_save.", ".original_module.")  # of parts that are saved whole: they are above
        changed |= {n: bias.detach() for n, bias in biases.items() if not any(part in n for part in not_here)}
    return changed


def _innermost(layer: nn.Module) -> nn.Module:
    while isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    return layer


def _merge(layer: nn.Module, inner: nn.Module) -> None:
    with torch.no_grad():
        for weight in inner.parameters(recurse=False):
            weight.data = weight.data.float() if weight.dtype != torch.float64 else weight.data
        layer.merge(safe_merge=True)  # type: ignore[operator]


def _part_tied(base: nn.Module) -> None:
    """Give an adapted embedding or head that share their weights one each: an adapter on one is none on the other."""
    parts = [_with_adapter(part) for part in (base.get_output_embeddings(), base.get_input_embeddings())]  # type: ignore[operator]
    if any(getattr(part, "tied_adapter", None) is not None for part in parts):
        return  # rows of new tokens: one adapter for both
    for part in parts:
        if isinstance(part, BaseTunerLayer):
            inner = _innermost(part)
            inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]


def _with_adapter(part: nn.Module) -> nn.Module:
    """The layer with the adapter inside of peft's wrapper around an embedding or head whose rows train."""
    return part.token_adapter if isinstance(part, TrainableTokensWrapper) else part


def parted_head(adapted: PeftModel, was_tied: bool) -> Tensor | None:
    """The weights of a head that was the embedding's, where the adapter made them differ; after `merged_weights`."""
    if not was_tied:
        return None
    base = adapted.get_base_model()
    head, embedding = (effective(part) for part in (base.get_output_embeddings(), base.get_input_embeddings()))
    return None if head is embedding or torch.equal(head, embedding) else head


def effective(part: nn.Module) -> Tensor:
    """The weights of an embedding or a head, after `merged_weights`, whatever peft has put around it."""
    if isinstance(part, ModulesToSaveWrapper):
        part = part.modules_to_save[ADAPTER]
    weight = _innermost(_with_adapter(part)).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def stored_head(module: PreTrainedModel, name: str, weight: Tensor, names: set[str], where: str) -> bool:
    """Whether the files hold a head that is the embedding, as some do: both would have to change then.

    Args:
        name, weight: of the head in the module. names: of all tensors in its files.
    """
    with foreign_errors(lambda why: ModelError(f"its head cannot be named as in its files: {why}", where=where)):
        return not names.isdisjoint(revert_weight_conversion(module, {name: weight}))


def in_files(module: PreTrainedModel, weights: Mapping[str, Tensor], names: set[str], where: str) -> dict[str, Tensor]:
    """Weights by their names in the model's files, and cut as they are there: transformers renames, stacks and joins
    some on loading.

    Args:
        module: as `from_pretrained` made it. weights: by their names in the module. names: of all tensors in its files.

    Raises:
        ModelError: the files have no place for one.
    """
    with foreign_errors(
        lambda why: ModelError(f"its weights cannot be written as its files have them: {why}", where=where)
    ):
        found = revert_weight_conversion(module, dict(weights))
    prefix = f"{module.base_model_prefix}."
    placed = {}
    for name, tensor in found.items():
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if name not in names and other not in names:
            raise ModelError(
                f"its files have no tensor {name}, which the adapter changes",
                where=where,
                fix="merge it with peft: load the model with the adapter, merge_and_unload(), save_pretrained()",
            )
        placed[name if name in names else other] = tensor
    return placed
