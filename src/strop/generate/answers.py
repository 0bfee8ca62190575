"""Prompts to answers, of the trained model and of its base: in the terminal, or as JSON Lines. Floor 7."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TextStreamer

from strop.durable import to_json
from strop.generate.loading import Loaded, Source, load
from strop.generate.output import write_target
from strop.generate.prompts import Prompt, encode
from strop.generate.sampling import Answer, Sampling, sample
from strop.policy.model.tokenizer import read_tokenizer
from strop.terminal import escaped, show


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answers; base: those of the model before training, where they were asked for."""

    prompt: Prompt
    answers: Sequence[Answer]
    base: Sequence[Answer] | None


class Shown(TextStreamer):  # type: ignore[misc]
    """Writes an answer to standard output as it comes."""

    def __init__(self, model: Loaded) -> None:
        super().__init__(model.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        show(escaped(text) + "\n" * stream_end)


def answer(
    source: Source, prompts: Sequence[Prompt], settings: Sampling, *, raw: bool = False, beside: bool = False
) -> list[Answered]:
    """Answers to all prompts, in their order. The two models are in memory one after the other.

    Args:
        raw: prompts are texts that the model goes on with, without a chat template.
        beside: ask the model that it was trained from, too.

    Raises:
        StropError: a model cannot be loaded, or a prompt cannot be written as tokens.
    """
    tokenizer = read_tokenizer(source.model)
    asked = [encode(tokenizer, prompt, raw=raw) for prompt in prompts]

    def of(which: Source) -> list[list[Answer]]:
        model = load(which, tokenizer)
        found = dict(sample(model, asked, settings))
        return [found[index] for index in range(len(asked))]

    base = of(source.base()) if beside else None
    gc.collect()
    own = of(source)
    return [Answered(p, own[i], None if base is None else base[i]) for i, p in enumerate(prompts)]


def stream(source: Source, prompt: Prompt, settings: Sampling, *, raw: bool = False) -> None:
    """One answer to one prompt, written to standard output as it comes."""
    model = load(source)
    ids = encode(model.tokenizer, prompt, raw=raw)
    for _ in sample(model, [ids], settings, Shown(model)):
        pass


def write_answers(found: Sequence[Answered], target: Path) -> None:
    """JSON Lines, one answer per line: `prompt` as it was given, `sample` (from 0), `completion`, `tokens`, `finish`,
    and the last three of the base as `base_...`, where it was asked.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_target(target, (f"{line}\n".encode() for line in _lines(found)))


def _lines(found: Sequence[Answered]) -> Iterator[str]:
    for item in found:
        for number, own in enumerate(item.answers):
            row: dict[str, object] = {"prompt": item.prompt.given, "sample": number, **_fields(own)}
            if item.base is not None:
                row |= {f"base_{name}": value for name, value in _fields(item.base[number]).items()}
            yield to_json(row)


def _fields(one: Answer) -> dict[str, object]:
    return {"completion": one.text, "tokens": one.tokens, "finish": one.finish}


def in_words(found: Sequence[Answered]) -> Iterator[str]:
    """Answers for a person."""
    for item in found:
        yield f"> {escaped(item.prompt.shown())}"
        for number, own in enumerate(item.answers):
            if item.base is not None:
                yield f"base:    {escaped(item.base[number].text)}"
                yield f"trained: {escaped(own.text)}"
            else:
                yield escaped(own.text)
        yield ""
