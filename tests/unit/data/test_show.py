"""Showing a group: the whole text, the trained part marked, nothing that steers a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strop.data.load import load_data
from strop.data.text.encode import Encoded, Encoder
from strop.data.text.render import Renderer
from strop.data.text.show import odd_groups, show_group
from strop.data.text.truncate import Limits, truncate
from strop.types import Example, Group, Message, Origin

HERE = Origin("rows.jsonl", 1)


def group(tokenizer: Any, prompt: str, *sides: tuple[Message, ...]) -> Group:
    renderer = Renderer(tokenizer)
    example = Example(({"role": "user", "content": prompt},), sides, HERE)
    (encoded,) = Encoder(tokenizer, renderer.template).encode([renderer.render(example)])
    assert isinstance(encoded, Encoded)
    done = truncate(encoded, Limits(1000), HERE, bos=None).group
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


def test_where_inference_begins_and_stops_is_told(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    lines = show_group(group(tokenizer, "q", says("a dog")), tokenizer).splitlines()
    assert lines[0].endswith("tokens; inference begins at its end)")
    assert any(line.startswith("completion (") and line.endswith("generation stops at <|end|>)") for line in lines)


def test_long_stretches_lose_their_middle_where_they_are_abridged(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    long = group(tokenizer, "begin " + "quick " * 250 + "end", says("x"))
    text = show_group(long, tokenizer, whole=False)
    assert "begin" in text and "end<|end|>" in text and "characters ...]" in text and len(text) < 1500
    assert "quick " * 250 in show_group(long, tokenizer)


def test_the_oddest_rows_are_found_one_of_each_kind(
    tmp_path: Path, make_config: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    rows = [
        {"prompt": "q", "completion": "x"},
        {"prompt": "q", "completion": "x " * 40},
        {"prompt": "q </s> r", "completion": "a fox"},
        {"prompt": "q </s>", "completion": "x"},
        {"prompt": "r", "completion": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(train_file=str(tmp_path / "rows.jsonl"), validation_split=0.0)
    found = odd_groups(load_data(config, make_tokenizer(), "single").train)
    assert [number for _, number in found] == [1, 3]
    assert found[0][0] == "the longest" and "control tokens" in found[1][0]
