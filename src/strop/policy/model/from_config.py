"""A model from its configuration alone: its size in numbers, or a few layers of it to be timed. Floor 2.

No weight is loaded. What comes of it is for the estimate; a run takes `load_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from strop.config.sections import LoraSection, ModelSection
from strop.errors import ModelError, StropError, first_line
from strop.policy.gradient_checkpointing import layers_that_can
from strop.policy.model.adapter_settings import adapters_of
from strop.policy.model.adapter_targets import linear_layers, resolve_parameters, resolve_targets, selected
from strop.policy.model.configuration import LOAD_ERRORS, model_config, quiet
from strop.policy.model.folder import place_of
from strop.policy.model.load import LoadedModel
from strop.policy.model.logit_transform import LogitTransform, logit_transform
from strop.policy.model.quantisation_settings import quantisation_of
from strop.policy.model.random_parts import silence_config
from strop.policy.model.shape_check import meta_model
from strop.policy.model.task import auto_class, head_of, with_one_label
from strop.policy.prefix_sharing import reason_against

logger = logging.getLogger("strop")

OUTPUTS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "wo", "w2"})
"""Linear layers at the end of an attention or feed-forward block; the others of a block share its input."""


class CannotBuildError(ModelError):
    """The architecture needs more than its configuration, which is no fault of the run."""


@contextmanager
def predicting(what: str) -> Iterator[None]:
    """What fails inside is the estimate alone, whose place is before a run and never in its way.

    Raises:
        CannotBuildError: in place of any error that is none of strop's own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StropError):
            raise
        logger.debug("the estimate failed", exc_info=error)
        raise CannotBuildError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def reason_for_plain_rows(model: ModelSection) -> str | None:
    """Why prompts will not be shared, as far as the configuration tells; None: they will be, unless the probe of the
    loaded model refuses it."""
    return reason_against(model_config(model), model.attn_implementation)


def empty_model(model: ModelSection, *, reward_model: bool = False) -> PreTrainedModel:
    """The model built from its configuration on torch's meta device: shapes without weights.

    Raises:
        CannotBuildError: its configuration does not suffice.
    """
    config = model_config(model)
    if reward_model:
        with_one_label(config)
    config.get_text_config().vocab_size += len(model.add_tokens or ())
    with _building(model):
        return meta_model(config, trust_remote_code=model.trust_remote_code, reward_model=reward_model)


def num_weights(model: ModelSection, *, reward_model: bool = False) -> int:
    """How many weights the model has, tied ones once.

    Raises:
        CannotBuildError: its configuration does not suffice.
    """
    return sum(weight.numel() for weight in empty_model(model, reward_model=reward_model).parameters())


def random_model(
    model: ModelSection, *, layers: int, vocabulary: int, dtype: torch.dtype, reward_model: bool = False
) -> LoadedModel:
    """A model of the same architecture with this many layers and at most this many tokens, whose weights mean nothing.

    Raises:
        CannotBuildError: the architecture cannot be built so.
    """
    config = model_config(model)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.vocab_size = min(text.vocab_size, vocabulary)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    silence_config(config)
    config.use_cache = False
    if reward_model:
        with_one_label(config)
    with _building(model), no_init_weights():
        module: PreTrainedModel = auto_class(reward_model=reward_model).from_config(
            config,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=model.attn_implementation,
        )
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    with torch.no_grad():
        for weight in module.parameters():
            for part in weight.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    return LoadedModel(module.train(), dtype, config)


@contextmanager
def _building(model: ModelSection) -> Iterator[None]:
    try:
        with quiet():
            yield
    except LOAD_ERRORS as error:
        raise CannotBuildError(
            f"it cannot be built from config.json alone: {first_line(error)}", where=place_of(model)
        ) from error


@dataclass(frozen=True)
class Shape:
    """A model in numbers: width D, feed-forward width I, attention widths (queries A, keys and values K), heads of
    queries, layers, vocabulary; matrix: weights of all linear layers but the head; others: all further weights, tied
    ones once. transform: of the logits. capped: attention makes all its scores, to cap them or to put sinks beside
    them. recomputes: its layers can compute their activations again."""

    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    layers: int
    vocabulary: int
    matrix: int
    others: int
    transform: LogitTransform
    capped: bool = False
    recomputes: bool = True
    adapters: int = 0
    adapted: float = 0.0
    distinct: float = 0.0
    matrix_bytes: float | None = None
    teacher: int = 0
    new_rows: int = 0
    """adapters: their weights. adapted: inputs of adapted layers, in elements per token and layer; distinct: those that
    several of them share (q, k, v; gate, up) counted once. matrix_bytes: of each weight of `matrix`, with its scales,
    where the base is quantised; None: it is not. teacher: weights of a second model that reads every batch. new_rows:
    of embedding and head, which train beside adapters."""


def shape_of(lora: LoraSection, model: ModelSection, *, reward_model: bool = False) -> Shape:
    """The model in numbers, built without weights.

    Raises:
        CannotBuildError: the architecture needs more than its configuration.
        ModelError: the adapters do not fit the model.
    """
    module, bits = empty_model(model, reward_model=reward_model), quantisation_of(model)
    try:
        shape = _without_adapters(module, module.config.get_text_config())
        shape = replace(shape, matrix_bytes=None if bits is None else bits.bytes_per_weight)
    except LOAD_ERRORS as error:  # an architecture whose configuration has other names, or one per layer
        found = f"its config.json does not say how large it is: {first_line(error)}"
        raise CannotBuildError(found, where=place_of(model)) from error
    adapters = adapters_of(lora, model)
    if adapters is None:
        return shape
    targets = resolve_targets(module, adapters.target_modules, place_of(model))
    linears = linear_layers(module)
    sides = {name: _sides(linears[name]) for name in selected(targets, linears)}
    weights = adapters.r * sum(i + o for i, o in sides.values())
    experts = resolve_parameters(module, adapters.target_parameters or (), place_of(model))
    weights += adapters.r * sum(n * (i + o) for n, i, o in (p.shape for p in experts.values()))
    new_rows = len(model.add_tokens or ()) * (1 if reward_model or module.config.tie_word_embeddings else 2)
    weights += new_rows * shape.width
    adapted = sum(i for i, _ in sides.values()) / shape.layers
    shared = {(n.rpartition(".")[0], n.rpartition(".")[2] in OUTPUTS): i for n, (i, _) in sides.items()}
    distinct = sum(shared.values()) / shape.layers
    return replace(shape, adapters=weights, adapted=adapted, distinct=distinct, new_rows=new_rows)


def _without_adapters(module: PreTrainedModel, text: PreTrainedConfig) -> Shape:
    heads = _most(text, "num_attention_heads", 1)
    width = _most(text, "hidden_size")
    head_dim = _most(text, "head_dim", 0) or width // heads
    matrix = sum(layer.weight.numel() for layer in linear_layers(module).values())  # type: ignore[operator, misc]
    return Shape(
        width=width,
        inner=_most(text, "intermediate_size", 0) or 4 * width,
        queries=heads * head_dim,
        keys=(_most(text, "num_key_value_heads", 0) or heads) * head_dim,
        heads=heads,
        layers=_most(text, "num_hidden_layers"),
        vocabulary=head_of(module).weight.shape[0],
        matrix=matrix,
        others=sum(p.numel() for p in module.parameters()) - matrix,
        capped=getattr(text, "attn_logit_softcapping", None) is not None or _has_sinks(module),
        transform=logit_transform(text),
        recomputes=bool(layers_that_can(module)),
    )


def _has_sinks(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "sinks" for name, _ in module.named_parameters())


def _most(text: PreTrainedConfig, name: str, otherwise: int | None = None) -> int:
    """A size of the configuration; the largest, where it names one per layer."""
    value = getattr(text, name) if otherwise is None else getattr(text, name, None)
    if isinstance(value, list | tuple):
        value = max((number for number in value if number is not None), default=None)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, which is no size")
    return int(value)


def _sides(layer: nn.Module) -> tuple[int, int]:
    out, inside = layer.weight.shape  # type: ignore[misc]
    return int(inside), int(out)
