"""A run, an adapter or a model, ready to answer. Floor 7."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from strop.config.sections import GpuSection, ModelSection
from strop.device import pick_device
from strop.errors import ModelError, foreign_errors
from strop.export.converted_bases import in_transformers
from strop.export.shards import memory_dtype, read_header
from strop.policy.model.adapter_base import saved_model
from strop.policy.model.adapters import with_adapter
from strop.policy.model.end_tokens import end_tokens
from strop.policy.model.folder import check_exists, inspect_model, place_of, source_of
from strop.policy.model.load import load_model
from strop.policy.model.tokenizer import check_vocabulary, read_tokenizer
from strop.rundir import FINAL


@dataclass(frozen=True)
class Source:
    """What is to answer, before it is loaded.

    model: with its adapter, where it has one. trained_from: the model that a full training began with; None where that
    is not known, and for an adapter, whose base is the model itself."""

    model: ModelSection
    trained_from: str | None = None

    @classmethod
    def of(cls, given: str) -> Source:
        """given: a run folder, an adapter, a model folder or a hub id.

        Raises:
            ModelError: it is none of these.
        """
        run = Path(given).expanduser()
        ended = (run / FINAL).is_dir()
        given = in_transformers(given)
        check_exists(given, given)
        model = saved_model(source_of(str(run / FINAL) if ended else given))
        return cls(model, _trained_from(run) if ended and model.adapter is None else None)

    def base(self) -> Source:
        """The model that it was trained from.

        Raises:
            ModelError: that is not known.
        """
        if self.model.adapter is not None:
            return Source(self.model.model_copy(update={"adapter": None}))
        if self.trained_from is None:
            raise ModelError(
                "what it was trained from is not known",
                where=self.model.huggingface_id,
                expected="a run folder, or an adapter, which names its base",
                fix="strop eval: name it with --reference MODEL; strop generate: leave --base out",
            )
        return Source(ModelSection(huggingface_id=self.trained_from))


def _trained_from(run: Path) -> str | None:
    file = run / "config.yaml"
    if not file.is_file():
        return None
    with foreign_errors(lambda why: ModelError(f"config.yaml cannot be read: {why}", where=str(run))):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    models = content.get("models") if isinstance(content, Mapping) else None
    named = [m for m in models or () if isinstance(m, Mapping) and m.get("name") == run.resolve().name]
    found: Any = (named or [*(models or ()), {}])[0]
    model_id = found.get("huggingface_id") if isinstance(found, Mapping) else None
    return model_id if isinstance(model_id, str) else None


@dataclass(frozen=True)
class Loaded:
    """A model that answers. stops: the tokens that end an answer. limit: its positions, where it says so."""

    module: Any
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    limit: int | None
    where: str

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.module.parameters()).device
        return found


def load(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> Loaded:
    """The model with its adapter, in inference mode: on a GPU in the dtype of its files, on a CPU in float32 where its
    memory is large enough.

    Args:
        tokenizer: default: that of the adapter, where it has one, else the model's.

    Raises:
        ModelError: it cannot be loaded.
    """
    model, files = source.model, inspect_model(source.model)
    device, _ = pick_device(GpuSection())
    dtype = files.stored
    if device.type == "cpu":
        dtype = memory_dtype([read_header(path) for path in files.weights], files.stored)
    loaded = load_model(model, dtype=dtype)
    tokenizer = tokenizer or read_tokenizer(model)
    check_vocabulary(tokenizer, loaded.module, place_of(model))
    module: nn.Module = loaded.module.eval()
    if model.adapter is not None:
        module = with_adapter(loaded.module, model)
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) else None
    return Loaded(module.to(device), tokenizer, end_tokens(model, tokenizer), limit, place_of(model))
