"""LoRA adapters: new ones, and continuing old ones. Floor 2.

A model and the `lora` section come in, a peft model goes out whose trainable weights are exactly the adapter's,
in float32 (float64 on a float64 model); everything else is frozen. The head is evaluated outside its own forward, so
it can be trained in full (`modules_to_save`) but not adapted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.config.sections import LoraSection, ModelSection
from strop.errors import ModelError, first_line, foreign_errors
from strop.policy.kernels.quantised_weights import is_quantised
from strop.policy.model.adapter_files import check_base, read_weights
from strop.policy.model.adapter_settings import (
    AGAIN,
    adapter_config,
    as_list,
    mergeable_config,
    read_adapter,
    try_patterns,
)
from strop.policy.model.adapter_targets import (
    head_names,
    linear_layers,
    no_such_name,
    reach,
    resolve_parameters,
    resolve_targets,
    selected,
    sizes,
)
from strop.policy.model.added_tokens import trained_rows
from strop.policy.model.configuration import LOAD_ERRORS, quiet
from strop.policy.model.folder import adapter_place_of, place_of, source_of
from strop.policy.model.task import SCORE, auto_class, head_of, is_reward_model

logger = logging.getLogger("strop")


def add_adapters(
    module: PreTrainedModel,
    lora: LoraSection,
    model: ModelSection,
    *,
    seed: int,
    master: torch.dtype,
    new_tokens: Sequence[int] = (),
) -> PeftModel:
    """New adapters, drawn from `seed` alone; `module` is on the CPU and is changed in place.

    Args:
        new_tokens: ids of tokens whose rows in the embedding and the head train, too.

    Raises:
        ModelError: `target_modules` or `modules_to_save` do not fit the model.
    """
    where = place_of(model)
    targets = resolve_targets(module, lora.target_modules, where)
    judges = is_reward_model(module)
    saved = _resolve_saved(module, (*(lora.modules_to_save or ()), *([SCORE] if judges else ())), where)
    linears, weights = linear_layers(module), sizes(module)
    experts = resolve_parameters(module, lora.target_parameters or (), where)
    transposed = any(isinstance(linears[name], Conv1D) for name in selected(targets, linears))
    if lora.moves_base:
        _check_moving(module, lora, [linears[name] for name in selected(targets, linears)], where)
    in_full = selected(saved, [name for name, _ in module.named_modules()])
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=list(lora.target_parameters or ()) or None,
        modules_to_save=list(saved) or None,
        trainable_token_indices=trained_rows(module, new_tokens, in_full, where) or None,
        init_lora_weights=lora.init_lora_weights,
        task_type=TaskType.SEQ_CLS if judges else lora.task_type,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        fan_in_fan_out=transposed,
        ensure_weight_tying=_is_tied(module) and any(_is_embedding(module, name) for name in saved),
        base_model_name_or_path=source_of(model.huggingface_id),
        revision=model.revision,
    )
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(module, config)
    except LOAD_ERRORS as error:
        raise ModelError(f"adapters cannot be added: {first_line(error)}", where=where) from error
    named = targets if isinstance(targets, str) else ", ".join(sorted({n.rpartition(".")[2] for n in targets}))
    logger.info("%s: adapters of rank %d on %s", where, lora.r, ", ".join([named, *(lora.target_parameters or ())]))
    assert not experts or _adapted_names(adapted) >= experts.keys()
    _tell_reach(adapted, weights, where)
    return _finish(adapted, master, where)


def _check_moving(module: nn.Module, lora: LoraSection, layers: Sequence[nn.Module], where: str) -> None:
    """Refuse layers whose weights cannot be moved into an adapter, and say that it takes a while.

    Raises:
        ModelError: they are quantised, or stored the other way round.
    """
    named = f"lora.init_lora_weights: {lora.init_lora_weights}"
    if any(map(is_quantised, layers)):
        raise ModelError(
            f"{named} changes the base's weights, and quantised ones cannot be changed by so little",
            where=where,
            expected="a base in 16 or 32 bits",
            fix="leave init_lora_weights out, or set models[].quant: none",
        )
    if lora.init_lora_weights == "olora" and any(isinstance(layer, Conv1D) for layer in layers):
        raise ModelError(
            f"{named}: peft cannot begin so on layers that are stored transposed (Conv1D, as in GPT-2)",
            where=where,
            fix="set init_lora_weights: pissa, or leave it out",
        )
    logger.info("%s: %s, of %d weights; this takes a while", where, named, len(layers))


def continue_adapters(
    module: PreTrainedModel, lora: LoraSection, model: ModelSection, *, master: torch.dtype
) -> PeftModel:
    """The adapter of `models[].adapter`, trainable. Its own rank, scale and targets hold; only `lora_dropout` is the
    configuration's. `module` is on the CPU and is changed in place.

    Raises:
        ModelError: it cannot be read, is no LoRA adapter, does not fit the model, or `lora` says something else.
    """
    assert model.adapter is not None
    where = adapter_place_of(model)
    settings, weights = read_adapter(model.adapter, where)
    config = adapter_config(settings, lora, where)
    with foreign_errors(partial(_does_not_fit, where)), quiet():
        return _continued(module, config, settings, weights, model, master)


def _continued(
    module: PreTrainedModel,
    config: LoraConfig,
    settings: Mapping[str, Any],
    weights: Path,
    model: ModelSection,
    master: torch.dtype,
) -> PeftModel:
    """The adapter of these settings and weights on the model."""
    where = adapter_place_of(model)
    judges, kinds = is_reward_model(module), ("a language model", "a reward model")
    if judges != (settings.get("task_type") == TaskType.SEQ_CLS):
        raise ModelError(
            f"it is an adapter of {kinds[not judges]}, and is to be one of {kinds[judges]}",
            where=where,
            fix="merge an adapter of a language model into it first, and train the result",
        )
    check_base(settings, model, where)
    config.base_model_name_or_path, config.revision = source_of(model.huggingface_id), model.revision
    try_patterns(settings, [name for name, _ in module.named_modules()], where)
    stored = read_weights(weights, where)
    before = sizes(module)
    adapted = PeftModel.from_pretrained(module, str(weights.parent), is_trainable=True, config=config)
    check_loaded(adapted, stored, where)
    if any(_is_head_or_embedding(module, name) for name, part in _adapted_parts(adapted)):
        raise ModelError("it adapts the head or the embedding", where=where, fix="merge it into the model first")
    targets = ", ".join(sorted([*as_list(config.target_modules), *as_list(config.target_parameters)]))
    logger.info("%s: continued, rank %d, alpha %g, on %s", where, config.r, config.lora_alpha, targets)
    _tell_reach(adapted, before, where)
    return _finish(adapted, master, where)


def with_adapter(module: PreTrainedModel, model: ModelSection) -> PeftModel:
    """The adapter of `models[].adapter` on its base, as plain peft loads it.

    Raises:
        ModelError: it cannot be read, is of a kind that cannot be merged, or does not fit the model.
    """
    assert model.adapter is not None
    where = adapter_place_of(model)
    settings, weights = read_adapter(model.adapter, where)
    if settings.get("task_type") == TaskType.SEQ_CLS and not is_reward_model(module):
        raise ModelError(
            "it is the adapter of a reward model, which answers with a number",
            where=where,
            expected="the adapter of a language model",
            fix="strop eval --method reward evaluates it, and strop merge makes a whole reward model of it",
        )
    if settings.get("task_type") != TaskType.SEQ_CLS and is_reward_model(module):
        raise ModelError(
            "it is the adapter of a language model, which gives no rewards",
            where=where,
            expected="the adapter of a reward model",
            fix="train one (method reward), or name a reward model",
        )
    check_base(settings, model, where)
    config = mergeable_config(settings, [n for n, _ in module.named_modules()], where)
    stored = read_weights(weights, where)
    with foreign_errors(partial(_does_not_fit, where)), quiet():
        adapted = PeftModel.from_pretrained(module, str(weights.parent), config=config)
    # beside the adapter of an embedding, peft saves the embedding
    check_loaded(adapted, {n: t for n, t in stored.items() if not n.endswith(".base_layer.weight")}, where)
    return adapted.eval()


def _does_not_fit(where: str, why: str) -> ModelError:
    return ModelError(
        f"it does not fit the model: {why}",
        where=where,
        expected="the model that it was made on, and weights of the rank and the layers that adapter_config.json names",
        fix=f"name that model, or {AGAIN}",
    )


def trainable_names(module: nn.Module) -> dict[str, str]:
    """The weights that train: the name that each has in a saved folder -> its name in the module. They differ in
    adapters, where peft leaves out the adapter's name.

    Raises:
        KeyError: a weight trains that peft does not save.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not isinstance(module, PeftModel):
        return {name: name for name in named}
    own = module.state_dict(keep_vars=True)  # the weights themselves, which peft only names otherwise
    saved = get_peft_model_state_dict(module, state_dict=own, save_embedding_layers=False)
    saved_names = {id(weight): name for name, weight in reversed(saved.items())}
    return {saved_names[id(weight)]: name for name, weight in named.items()}


def _resolve_saved(module: nn.Module, wanted: tuple[str, ...], where: str) -> tuple[str, ...]:
    parts = [name for name, _ in module.named_modules() if name]
    for name in wanted:
        if not selected((name,), parts):
            named = (part for part in parts if not part.rpartition(".")[2].isdigit())
            raise no_such_name("lora.modules_to_save", "module", name, named, where, "names")
        if any(is_quantised(part) for full, part in module.named_modules() if full in selected((name,), [full])):
            raise ModelError(
                f"lora.modules_to_save: {name} is quantised, so it cannot be trained in full",
                where=where,
                fix="adapt it (lora.target_modules), or set models[].quant: none",
            )
        if _is_tied(module) and _is_head_or_embedding(module, name) and name.rpartition(".")[2] != "embed_tokens":
            raise ModelError(
                f"lora.modules_to_save: {name} shares its weights with the "
                f"{'embedding' if not _is_embedding(module, name) else 'head'}; a copy of its own would part them",
                where=where,
                fix="name embed_tokens, which trains both, where the model has it; else leave it out",
            )
    return wanted


def _is_tied(module: nn.Module) -> bool:
    head = head_of(module)
    return head is not None and head.weight is module.get_input_embeddings().weight  # type: ignore[operator]


def _is_embedding(module: nn.Module, name: str) -> bool:
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    parts = dict(module.named_modules())
    return any(parts[full] is embedding for full in selected((name,), parts))


def _is_head_or_embedding(module: nn.Module, name: str) -> bool:
    return _is_embedding(module, name) or bool(selected((name,), head_names(module)))


def _finish(adapted: PeftModel, master: torch.dtype, where: str) -> PeftModel:
    """Weights that train to the master dtype; nothing trains that would not be saved."""
    config = adapted.peft_config["default"]
    if not isinstance(config.target_modules, str):  # which is a regular expression, and means another thing in a list
        config.target_modules = sorted(config.target_modules or ())  # peft's set would be saved in any order
    config.target_parameters = sorted(config.target_parameters or ()) or None
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(master)
    try:
        names = trainable_names(adapted)
    except KeyError:
        raise ModelError("adapters make weights trainable that peft does not save", where=where) from None
    assert names, "adapters without weights"
    return adapted


def check_loaded(adapted: PeftModel, stored: Mapping[str, Tensor], where: str) -> None:
    """Every tensor of the adapter's file has its place in the model, and is there as it is stored.

    Raises:
        ModelError: one is missing, left over, or not what was stored.
    """
    inside = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(set(inside) - set(stored)):
        raise ModelError(
            f"{len(missing)} of its weights are missing, the first is {missing[0]}", where=where, fix=AGAIN
        )
    if left := sorted(set(stored) - set(inside)):
        raise ModelError(
            f"{len(left)} of its weights have no place in the model, the first is {left[0]}",
            where=where,
            fix="name the model that the adapter was made on in huggingface_id",
        )
    for name, tensor in inside.items():
        if not torch.equal(tensor, stored[name].to(tensor.dtype)) or not torch.isfinite(tensor).all():
            raise ModelError(
                f"{name} was not read as it is stored, or is not finite",
                where=where,
                expected="numbers",
                fix=f"{AGAIN}; where it was saved so, take an earlier checkpoint of its run",
            )


def _adapted_parts(adapted: PeftModel) -> list[tuple[str, nn.Module]]:
    base = adapted.get_base_model()
    return [(name, part) for name, part in base.named_modules() if isinstance(part, BaseTunerLayer)]


def _adapted_names(adapted: PeftModel) -> set[str]:
    """Full names in the base model of the layers and of the experts' weights that carry an adapter."""
    names = set()
    for name, part in _adapted_parts(adapted):
        plain = ".".join(piece for piece in name.split(".") if piece != "base_layer")
        parameter = getattr(part, "parameter_name", None)  # of a wrapper around a module's weight
        names.add(plain if parameter is None else f"{plain}.{parameter}")
    return names


def _tell_reach(adapted: PeftModel, weights: Mapping[str, int], where: str) -> None:
    for line in reach(weights, _adapted_names(adapted)):
        logger.info("%s: %s", where, line)


def check_adapter(
    trained: Mapping[str, Tensor], folder: Path, config: PreTrainedConfig, where: str, *, reward_model: bool = False
) -> None:
    """Load a written adapter again by plain peft, on a model of shapes without weights: every tensor of the file has
    its place there, and is what was trained.

    Args:
        trained: what should have been written, by the names in the file.

    Raises:
        ModelError: peft does not load it, or loads something else.
    """
    try:
        with quiet(), torch.device("meta"):
            base = auto_class(reward_model=reward_model).from_config(config)
            base.tie_weights()
    except LOAD_ERRORS as error:  # an architecture that cannot be built without its weights
        logger.warning("%s: the written adapter was not loaded again: %s", where, first_line(error))
        return
    try:
        # peft draws new adapters before it loads these; the caller's random numbers stay as they were
        with quiet(), torch.random.fork_rng(devices=[]):
            again = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
            places = get_peft_model_state_dict(again, save_embedding_layers=False)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"peft does not load the adapter that was written: {first_line(error)}", where=where
        ) from error
    written = load_file(folder / "adapter_model.safetensors")
    wrong = sorted(written.keys() ^ places.keys() | written.keys() ^ trained.keys()) or [
        name
        for name, tensor in written.items()
        if tensor.shape != places[name].shape or not torch.equal(tensor, trained[name].detach().cpu())
    ]
    if wrong:
        found = f"peft loads another adapter than was trained: {len(wrong)} weights differ, the first is {wrong[0]}"
        raise ModelError(found, where=where)
