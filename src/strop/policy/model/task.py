"""What a model is for: a language model has a head over the vocabulary, a reward model a head of one number. Floor 2.

A reward model is a sequence-classification model of transformers with one label (`num_labels` 1), whose linear layer
`score` makes a number of the hidden state at the last token. transformers takes the rightmost token that is not
`pad_token_id`, so the configuration has to name one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SCORE = "score"
"""Name of the head of a reward model, in all decoders of transformers."""
WRITING_HEADS = ("lm_head.", "embed_out.")
"""What names of the head of a language model begin with, which a reward model made of it does not have."""


def auto_class(*, reward_model: bool) -> Any:
    """The class of transformers that builds and loads such models."""
    # seconds, which a dry run's first example does not wait for
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM


def is_reward_model(module: nn.Module) -> bool:
    """Whether the head of a transformers model gives one number. module: without adapters around it."""
    return type(module).__name__.endswith("ForSequenceClassification")


def head_of(module: nn.Module) -> Any:
    """The head of a transformers model, or None where it has none."""
    if is_reward_model(module):
        return getattr(module, SCORE, None)
    return module.get_output_embeddings()  # type: ignore[operator]


def with_one_label(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, changed in place to that of a reward model."""
    if config.num_labels != 1:
        config.num_labels = 1
    return config


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a reward model takes for padding: that of the tokenizer, or else its end token, as TRL has it."""
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def draw_score(module: nn.Module, seed: int) -> None:
    """Give a new head its first weights: from a normal distribution, as the architecture has it, from `seed` alone."""
    weight = head_of(module).weight
    std = getattr(module.config.get_text_config(), "initializer_range", 0.02)  # type: ignore[union-attr, operator]
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * std
    with torch.no_grad():
        weight.copy_(drawn)
