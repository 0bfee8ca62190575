"""A conversation in the terminal. Floor 7."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from strop.errors import ModelError
from strop.generate.answers import Shown
from strop.generate.loading import Source, load
from strop.generate.prompts import Messages, encode_turns
from strop.generate.sampling import Sampling, sample
from strop.terminal import show

HINT = "/new begins another conversation, /quit (or Ctrl-D) ends\n"


def chat(source: Source, settings: Sampling) -> None:
    """Answers each line of standard input as the next turn, with all turns before it.

    Raises:
        ModelError: the model cannot be loaded, or has no chat template.
    """
    model = load(source)
    if not model.tokenizer.chat_template:
        raise ModelError(
            "its tokenizer has no chat template, so there is no conversation to have",
            where=model.where,
            fix="give a prompt: strop generate MODEL PROMPT goes on with it",
        )
    if sys.stdin.isatty():
        show(HINT)
    turns: Messages = []
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            turns = []
            continue
        turns.append({"role": "user", "content": line})
        ids = encode_turns(model.tokenizer, turns, f"turn {len(turns)}")
        for _, (reply,) in sample(model, [ids], settings, Shown(model)):
            turns.append({"role": "assistant", "content": reply.text})


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
