"""Showing a group: the whole text, the trained part marked, nothing that steers a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from strop.data.chat import Renderer
from strop.data.encode import Encoded, Encoder
from strop.data.show import show_group
from strop.data.truncate import Limits, cut
from strop.types import Example, Group, Message, Origin

HERE = Origin("rows.jsonl", 1)


def group(tokenizer: Any, prompt: str, *sides: tuple[Message, ...]) -> Group:
    renderer = Renderer(tokenizer)
    example = Example(({"role": "user", "content": prompt},), sides, HERE)
    (encoded,) = Encoder(tokenizer, renderer.template).encode([renderer.render(example)])
    assert isinstance(encoded, Encoded)
    done = cut(encoded, Limits(1000), HERE, bos=None).group
    assert done is not None
    return done


def says(*contents: str) -> tuple[Message, ...]:
    roles = ("assistant", "user") * len(contents)
    return tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_trained_tokens_stand_between_marks(kind: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(kind)
    text = show_group(group(tokenizer, "a dog", says("the fox", "and", "日本")), tokenizer)
    assert text.splitlines()[0].startswith("prompt (")
    assert "<|start|>user\na dog<|end|>" in text
    assert "\n«the fox<|end|>»\n<|start|>user\nand<|end|>\n<|start|>assistant\n«日本<|end|>»" in text


def test_both_sides_of_a_pair_are_labelled(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    text = show_group(group(tokenizer, "q", says("a dog"), says("the fox")), tokenizer, colour=True)
    assert text.index("chosen (") < text.index("a dog") < text.index("rejected (") < text.index("the fox")
    assert "\x1b[1;32ma dog<|end|>\x1b[0m" in text


def test_what_steers_a_terminal_is_shown_as_an_escape(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    text = show_group(group(tokenizer, "\x1b[2Jq\u202e", says("\x07x\r\n\ty")), tokenizer)
    assert "\\x1b[2Jq\\u202e" in text and "«\\x07x\\r\n\ty<|end|>»" in text
    assert "\x1b" not in text and "\x07" not in text
