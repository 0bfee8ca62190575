"""Tokens to tokens: what a model goes on with. Floor 7.

transformers' own `generate` draws them, with nothing but the settings given here, so that answers are those that its
users get. (Training samples by `rollout/sampler.py`, whose draws do not depend on the prompts beside them.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from strop.errors import DataError
from strop.generate.loading import Loaded
from strop.policy.model.configuration import quiet

BATCH_TOKENS = 16_384
"""Prompt and answer of all rows of a batch, padding counted."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature: 0 takes the likeliest token each time. top_p: only the likeliest tokens that together have this
    probability. seed: the same one gives the same answers to the same prompts. num_samples: answers to each prompt;
    above 1 only with a temperature. stop: texts that end an answer, too."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    num_samples: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """finish: `stop`, or `length` where `max_new_tokens` cut it. tokens: how many there are, an end token or those of a
    stop text too."""

    text: str
    tokens: int
    finish: str


def sample(
    model: Loaded, prompts: Sequence[Sequence[int]], settings: Sampling, streamer: Any = None
) -> Iterator[tuple[int, list[Answer]]]:
    """`num_samples` answers to each prompt, with the prompt's index, in batches of like length.

    Args:
        streamer: is handed the tokens as they come; for one prompt and one answer.

    Raises:
        DataError: prompt and answer are longer than the model's positions.
    """
    for index, prompt in enumerate(prompts):
        if model.limit is not None and len(prompt) + settings.max_new_tokens > model.limit:
            raise DataError(
                f"prompt {index + 1} has {len(prompt)} tokens, and {settings.max_new_tokens} more may follow",
                where=model.where,
                expected=f"at most {model.limit} together, the positions of the model",
                fix="lower --max-new-tokens, or shorten the prompt",
            )
    for batch in _batches(prompts, settings):
        answers = _generate(model, [prompts[i] for i in batch], settings, streamer, seed=settings.seed + batch[0])
        for at, index in enumerate(batch):
            yield index, answers[at * settings.num_samples : (at + 1) * settings.num_samples]


def _batches(prompts: Sequence[Sequence[int]], settings: Sampling) -> Iterator[list[int]]:
    """Indices of prompts that are answered together, the longest first, so that what does not fit fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        width = len(prompts[batch[0] if batch else index]) + settings.max_new_tokens
        if batch and width * settings.num_samples * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generate(
    model: Loaded, prompts: Sequence[Sequence[int]], settings: Sampling, streamer: Any, seed: int
) -> list[Answer]:
    width = max(map(len, prompts))
    together = max(1, BATCH_TOKENS // (width + settings.max_new_tokens)) if len(prompts) == 1 else settings.num_samples
    rows = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    drawn = settings.temperature > 0
    chosen = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if drawn else {}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=drawn,
        eos_token_id=list(model.stops),
        pad_token_id=0,
        use_cache=True,
        stop_strings=list(settings.stop) or None,
        **chosen,
    )
    inner = model.module.get_base_model() if hasattr(model.module, "peft_config") else model.module
    inner.generation_config = GenerationConfig()  # the model's own would fill in what is not said here
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet():
        torch.manual_seed(seed)
        out = [
            row[width:]
            for done in range(0, settings.num_samples, together)
            for row in model.module.generate(
                input_ids=rows,
                attention_mask=mask,
                generation_config=config,
                num_return_sequences=min(together, settings.num_samples - done),
                streamer=streamer,
                **({"tokenizer": model.tokenizer} if settings.stop else {}),
            ).tolist()
        ]
    return [_answer(model, row, settings) for row in out]


def _answer(model: Loaded, row: list[int], settings: Sampling) -> Answer:
    at = next((i for i, token in enumerate(row) if token in model.stops), None)
    ids = row if at is None else row[: at + 1]

    def text_of(count: int) -> str:
        return str(model.tokenizer.decode(ids[:count], skip_special_tokens=True))

    def has_ended(count: int) -> bool:
        return any(stop in text_of(count) for stop in settings.stop)

    text = text_of(len(ids))
    ends = [text.index(stop) for stop in settings.stop if stop in text]
    if not ends:
        return Answer(text, len(ids), "length" if at is None else "stop")
    # up to the token with the end of the stop text; what follows is padding, while other answers go on
    count = bisect_left(range(len(ids)), True, key=has_ended)
    return Answer(text[: min(ends)], count, "stop")
