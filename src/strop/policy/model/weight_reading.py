"""How weights come out of the files of a model: all at once, quantised one by one, or later. Floor 2."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig

from strop.allocator import give_back_large_blocks
from strop.config.sections import ModelSection
from strop.policy.model.deferred_weights import DeferredWeights
from strop.policy.model.folder import ModelFiles, place_of
from strop.policy.model.shape_check import meta_model
from strop.policy.model.task import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("strop")


class Read(NamedTuple):
    """module: the model. report: what transformers says of its weights. waiting: those that are still in the files;
    None: all are read."""

    module: PreTrainedModel
    report: Mapping[str, Any]
    waiting: DeferredWeights | None = None


@dataclass(frozen=True)
class ModelReading:
    """A model that is to be read.

    dtype: of its weights. attention, quantising: what else `from_pretrained` is given, and with what it quantises.
    """

    model: ModelSection
    files: ModelFiles
    config: PreTrainedConfig
    dtype: torch.dtype
    attention: Mapping[str, str]
    quantising: Mapping[str, Any]
    reward_model: bool

    def read(self, *, defer: bool) -> Read:
        """The model; its weights are refused by the caller if they do not fit, with their names.

        Args:
            defer: leave the weights in the files, if each is a tensor of its own there.
        """
        if self._is_transformers_own:
            if defer and (read := self._deferred()) is not None:
                return read
            if "quantization_config" in self.quantising:
                return self._quantised()
        return self._whole()

    @property
    def _is_transformers_own(self) -> bool:
        """Whether the class of the model does not come with its files."""
        return not (self.model.trust_remote_code and "auto_map" in self.files.config)

    def _whole(self) -> Read:
        if self.quantising:
            give_back_large_blocks()
        module, report = auto_class(reward_model=self.reward_model).from_pretrained(
            self.files.source,
            config=self.config,
            revision=self.files.revision,
            dtype=self.dtype,
            trust_remote_code=self.model.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **self.attention,
            **self.quantising,
        )
        return Read(module, report)

    def _deferred(self) -> Read | None:
        """With placeholders in place of the weights; None where a weight is put together from several tensors of
        the files, as in most mixtures of experts."""
        outline, where = self._outline(), place_of(self.model)
        waiting = DeferredWeights(self.files.weights, where)
        if not waiting.fits(outline):
            logger.info("%s: its weights are put together from several tensors; each process reads all of them", where)
            return None
        read = self._of_tensors(outline, waiting.placeholders)
        return read._replace(waiting=waiting) if waiting.follow(read.module) else None

    def _quantised(self) -> Read:
        """Each tensor is read into memory of its own, which is free again once it is quantised. Left to itself,
        transformers maps the files, and what is not quantised keeps all of them in memory."""
        give_back_large_blocks()
        with ExitStack() as opened:
            tensors: dict[str, Any] = {}
            for path in self.files.weights:
                file = opened.enter_context(safe_open(path, framework="pt", backend="pread"))
                tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            return self._of_tensors(self._outline(), tensors)

    def _outline(self) -> PreTrainedModel:
        """The model without weights."""
        config = copy.deepcopy(self.config)
        return meta_model(config, trust_remote_code=False, reward_model=self.reward_model)

    def _of_tensors(self, outline: PreTrainedModel, tensors: Mapping[str, Any]) -> Read:
        """A model of the outline's class. tensors: by key, read by `tensor[...]`."""
        module, report = type(outline).from_pretrained(
            None,
            config=self.config,
            state_dict=tensors,
            dtype=self.dtype,
            generation_config=self._generation_config() if outline.can_generate() else None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **self.attention,
            **self.quantising,
        )
        module.name_or_path = module.config.name_or_path = self.files.source
        return Read(module, report)

    def _generation_config(self) -> GenerationConfig:
        """As transformers takes it when it loads a model by its name."""
        source, revision = self.files.source, self.files.revision
        try:
            return GenerationConfig.from_pretrained(source, revision=revision)
        except OSError:
            return GenerationConfig.from_pretrained(
                source, config_file_name="config.json", revision=revision, _from_model_config=True
            )
