"""Which layers of a model get adapters, and how much of it they reach. Floor 2.

A model comes in, with weights or on torch's meta device; names of layers go out, in the forms that peft takes: last
parts of full names, full names, or one regular expression. Only layers that text flows through are adapted: never a
vision or audio tower, its projector, or the router of a mixture of experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.config.names import did_you_mean
from strop.errors import ModelError
from strop.policy.kernels.quantised_weights import is_quantised
from strop.policy.model.quantised_base import num_weights
from strop.policy.model.task import head_of

Targets = tuple[str, ...] | str
"""Names, or a regular expression that full names match whole."""

# the attention projections by family, as the guides of these models adapt them; the first line that fits is taken
_FAMILIES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # llama, mistral, qwen, gemma, olmo, cohere, granite, starcoder2 ...
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # opt, gpt_neo, gptj
    ("q_proj", "k_proj", "v_proj", "dense"),  # phi
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),  # latent attention: deepseek, glm, minicpm3
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),  # the same with whole queries
    ("qkv_proj", "o_proj"),  # phi3
    ("query_key_value",),  # gpt_neox (pythia), bloom, falcon
    ("c_attn",),  # gpt2, gpt_bigcode
    ("Wqkv",),  # mpt
)
_OTHER_SENSES = ("vision", "visual", "image", "audio", "video")
"""Words in the names of what a multimodal model has beside its text model."""
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})  # as peft lists them
_SHOWN = 6


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by full name, the head left out, and routers that are one and give more than a product."""
    head = head_names(module)
    return {n: m for n, m in module.named_modules() if _is_linear(m) and n not in head}


def _is_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    if type(module) is nn.Linear or is_quantised(module):
        return True
    try:
        with torch.no_grad():
            return isinstance(module(module.weight[:1]), torch.Tensor)
    except Exception:  # noqa: BLE001 (code of any architecture is tried here; it wants more than one tensor)
        return False


def head_names(module: nn.Module) -> list[str]:
    """The full name of the head."""
    head = head_of(module)
    return [name for name, part in module.named_modules() if part is head]


def text_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers that text flows through, by full name: those of the text model, where it is inside a multimodal
    one or has towers of other senses inside."""
    part, layers = _text_part(module), linear_layers(module)
    if not part and _has_towers(module):
        return {n: layer for n, layer in layers.items() if not any(word in n for word in _OTHER_SENSES)}
    return {name: layer for name, layer in layers.items() if _is_inside(name, part)}


def _has_towers(module: nn.Module) -> bool:
    """Whether the configuration has parts for images or sound, as those have that are text models around them."""
    config = getattr(module, "config", None)
    return any(word in name for name in getattr(config, "sub_configs", {}) for word in _OTHER_SENSES)


def _without_routers(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    experts = _expert_counts(module)
    return {name: layer for name, layer in layers.items() if not _is_router(name, layer, experts)}


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Fused experts by full name: weights of three dimensions [experts, ..., ...], which are no layers."""
    inside = _text_part(module)
    return {n: p for n, p in module.named_parameters() if p.ndim == 3 and "experts" in n and _is_inside(n, inside)}


def _text_part(module: nn.Module) -> str:
    """The name of the text model inside of a multimodal one; empty where the whole model is one."""
    config = getattr(module, "config", None)
    text = config.get_text_config() if config is not None else None
    if text is None or text is config:
        return ""
    parts = [n for n, m in module.named_modules() if isinstance(m, PreTrainedModel) and type(m.config) is type(text)]
    return min(parts, key=len, default="")


def _is_inside(name: str, part: str) -> bool:
    return not part or name.startswith(f"{part}.")


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts a layer may have."""
    config = getattr(module, "config", None)
    text = config.get_text_config() if config is not None else None
    values = [getattr(text, name, None) for name in _NUM_EXPERTS]
    flat = [n for value in values for n in (value if isinstance(value, list | tuple) else [value])]
    return {n for n in flat if isinstance(n, int) and n > 1}


def _is_router(name: str, layer: nn.Module, experts: Collection[int]) -> bool:
    """Whether it chooses experts: it is called a router, or a gate that has an output per expert."""
    parts = name.split(".")
    return any("router" in part for part in parts) or (parts[-1] in ("gate", "wg") and _outputs(layer) in experts)


def _outputs(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(layer.weight.shape[1])  # type: ignore[index]


def resolve_targets(module: nn.Module, wanted: tuple[str, ...] | str, where: str) -> Targets:
    """Module names as peft takes them: the last parts of full names, or full names where these would name more than
    is meant; or a regular expression, as it was given.

    Raises:
        ModelError: a name that no linear layer has, the head's, or one that no text flows through.
    """
    linears, text, heads = linear_layers(module), text_layers(module), head_names(module)
    every = [name for name, _ in module.named_modules()]
    if wanted in ("auto", "all-linear"):
        unusable = {*_named_as_experts(module, text), *_refused_by_peft(module, text)}
        reached = {n: m for n, m in _without_routers(module, text).items() if n not in unusable}
        last_parts = sorted({name.rpartition(".")[2] for name in reached})
        fitting = [family for family in _FAMILIES if set(family) <= set(last_parts)]
        chosen = fitting[0] if wanted == "auto" and fitting else tuple(last_parts)
        return _meaning(chosen, reached, every)
    names: Targets = (wanted,) if isinstance(wanted, str) and selected((wanted,), [*linears, *heads]) else wanted
    for name in [names] if isinstance(names, str) else [(name,) for name in names]:
        if isinstance(name, tuple) and selected(name, heads):
            raise ModelError(
                f"lora.target_modules: {name[0]} is the head, which cannot carry an adapter: its log-probs are "
                "computed in tiles, outside the layer",
                where=where,
                fix=f"leave it out; to train the head in full, name {name[0]} in lora.modules_to_save",
            )
        if not (found := selected(name, linears)):
            wrong, named = name if isinstance(name, str) else name[0], "auto, all-linear, or names"
            raise no_such_name("lora.target_modules", "linear layer", wrong, text, where, named)
        if fused := selected(name, _named_as_experts(module, text)):
            raise ModelError(
                f"lora.target_modules: peft takes {fused[0].rpartition('.')[2]} of this architecture for a name of its "
                f"fused experts, so {fused[0]} cannot carry an adapter",
                where=where,
                expected="names of other layers",
                fix="leave it out; to adapt the experts, name them in lora.target_parameters",
            )
        if not selected(name, text):
            raise ModelError(
                f"lora.target_modules: no text flows through {found[0]}",
                where=where,
                expected="layers of the text model: images and sound are not trained here",
                fix="use auto or all-linear, or name layers of the text model",
            )
    return _meaning(names, text, every)


def selected(targets: Targets, layers: Iterable[str]) -> list[str]:
    """The layers that peft would adapt, by full name: a name is a full one or its last parts; a text is a regular
    expression of full names."""
    if not isinstance(targets, str):
        return [full for full in layers if any(full == t or full.endswith(f".{t}") for t in targets)]
    try:
        return [full for full in layers if re.fullmatch(targets, full)]
    except re.error:
        return []


def _named_as_experts(module: nn.Module, layers: Iterable[str]) -> list[str]:
    """Layers that peft does not find by their names: on architectures whose experts were layers once, it takes a name
    such as gate_proj for one of theirs, and adapts the fused experts instead."""
    if not isinstance(module, PreTrainedModel):
        return []
    last_parts = sorted({full.rpartition(".")[2] for full in layers})
    if not _is_renamed(module, last_parts):
        return []
    taken = {name for name in last_parts if _is_renamed(module, [name])}
    return [full for full in layers if full.rpartition(".")[2] in taken]


def _refused_by_peft(module: nn.Module, layers: Iterable[str]) -> list[str]:
    """Layers of Mamba models whose fused kernels read the weight itself, past an adapter."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return selected(("out_proj", "conv1d"), layers) if kind in _MAMBA else []


def _is_renamed(module: PreTrainedModel, names: list[str]) -> bool:
    """Whether peft reads one of the names as that of another weight: transformers joins some weights, such as those of
    experts."""
    config = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(config, module, None)
    except ValueError:  # one of them is one of several names of one weight
        return True
    return bool(config.target_parameters)


def _meaning(targets: Targets, reached: Mapping[str, nn.Module], every: Iterable[str]) -> Targets:
    """The targets as they are, where they name nothing beside what is reached; else the full names of what they name
    of it: a head, a vision tower or an activation may go by the same names."""
    if all(full in reached for full in selected(targets, every)):
        return targets
    return tuple(selected(targets, reached))


def no_such_name(key: str, kind: str, name: str, parts: Iterable[str], where: str, expected: str) -> ModelError:
    """The refusal of a name in a list of names of parts.

    Args:
        key: the setting. kind: what it names. parts: full names of those that are there. expected: the words in front
            of their last parts.
    """
    last_parts = sorted({part.rpartition(".")[2] for part in parts})
    return ModelError(
        f"{key}: no {kind} is called {name!r}",
        where=where,
        expected=f"{expected} among {', '.join(last_parts)}",
        fix=did_you_mean(name, last_parts),
    )


def resolve_parameters(module: nn.Module, wanted: Iterable[str], where: str) -> dict[str, nn.Parameter]:
    """The weights of fused experts that `lora.target_parameters` names, by full name.

    Raises:
        ModelError: a name that none of them has.
    """
    experts = expert_parameters(module)
    found: dict[str, nn.Parameter] = {}
    for name in wanted:
        named = {n: experts[n] for n in selected((name,), experts)}
        if not named:
            known = sorted({_kind(n) for n in experts})
            raise ModelError(
                f"lora.target_parameters: no fused experts are called {name!r}",
                where=where,
                expected=f"exact names among {', '.join(known)}" if known else "a model with fused experts",
                fix="name them as they are listed here" if known else "use lora.target_modules, which names layers",
            )
        found |= named
    return found


def sizes(module: nn.Module) -> dict[str, int]:
    """Weights of every layer that text flows through and of all fused experts, by full name, before it is adapted."""
    layers = {name: num_weights(layer) for name, layer in text_layers(module).items()}
    return layers | {name: p.numel() for name, p in expert_parameters(module).items()}


def reach(weights: Mapping[str, int], adapted: Collection[str]) -> list[str]:
    """Lines for a person: how many layers got adapters, what share of their weights that is, and what was left out.
    weights: as `sizes` gives them. adapted: full names."""
    total = max(1, sum(weights.values()))
    reached = sum(size for name, size in weights.items() if name in adapted)
    num = sum(name in adapted for name in weights)
    line = f"adapters on {num} of {len(weights)} linear layers, {100 * reached / total:.1f} % of their weights"
    left: Counter[str] = Counter()
    for name, size in weights.items():
        if name not in adapted:
            left[_kind(name)] += size
    if not left:
        return [line]
    shown = ", ".join(f"{kind} ({100 * size / total:.1f} %)" for kind, size in left.most_common(_SHOWN))
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return [line, f"without adapters: {shown}{more}"]


def _kind(name: str) -> str:
    """A full name without the numbers of its layers, from its last two named parts."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])
