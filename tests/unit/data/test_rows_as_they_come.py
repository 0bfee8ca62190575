"""Rows as people have them: one rule for every shape, and no part of a row is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rows import HERE, Row, a, read, refused, s, u
from strop.data.counters import COUNTERS
from strop.data.read.row import RowRefused
from strop.data.text.render import Renderer
from strop.types import Example, Message, RowShape, Turns


def conversation(example: Example) -> list[tuple[Message, ...]]:
    """The whole of it, once for each completion."""

    def turns(part: Turns) -> tuple[Message, ...]:
        assert not isinstance(part, str)
        return part

    return [turns(example.prompt) + turns(completion) for completion in example.completions]


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]
SHAPES: list[tuple[RowShape, Row]] = [
    ("single", {"messages": [u("q"), a("x")]}),
    ("single", {"prompt": "q", "completion": "x"}),
    ("single", {"prompt": [u("q")], "completion": [a("x")]}),
    ("single", {"prompt": "q", "completion": [a("x")]}),
    ("single", {"conversations": SHAREGPT}),
    ("single", {"question": "q", "answer": "x"}),
    ("single", {"instruction": "q", "output": "x"}),
    ("single", {"inputs": {"question": "q"}, "outputs": {"answer": "x"}}),
    ("pair", {"prompt": "q", "chosen": "x", "rejected": "y"}),
    ("pair", {"prompt": [u("q")], "chosen": [a("x")], "rejected": [a("y")]}),
    ("pair", {"prompt": [u("q")], "chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}),
    ("pair", {"chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}),
    ("pair", {"prompt": "q", "chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}),
    ("pair", {"messages": [u("q")], "chosen": "x", "rejected": "y"}),
    ("pair", {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "y"}}),
    ("pair", {"instruction": "q", "chosen": "x", "rejected": "y"}),
    ("pair", {"question": "q", "response_j": "x", "response_k": "y"}),
    ("pair", {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}),
    ("labelled", {"prompt": "q", "completion": "x", "label": True}),
    ("labelled", {"prompt": [u("q")], "completion": "x", "label": False}),
    ("labelled", {"messages": [u("q"), a("x")], "label": True}),
    ("labelled", {"conversations": SHAREGPT, "label": True}),
    ("labelled", {"instruction": "q", "output": "x", "label": True}),
    ("labelled", {"prompt": "q", "chosen": "x", "rejected": "y"}),
]


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(("rows", "row"), SHAPES)
def test_a_system_column_is_the_first_turn_of_every_shape(rows: RowShape, row: Row, column: str) -> None:
    answers = ["x"] if rows != "pair" and "chosen" not in row else ["x", "y"]
    found = conversation(read({**row, column: "b"}, rows))
    assert found == [(s("b"), u("q"), a(answer)) for answer in answers]
    for nothing in ("", "  ", None):
        blank = conversation(read({**row, column: nothing}, rows))
        assert blank == [turns[1:] for turns in found]


def test_a_system_turn_of_the_messages_wins_and_is_counted() -> None:
    row = {"messages": [s("b"), u("q"), a("x")]}
    for column, notes in (("b", ()), ("b\n", ()), ("other", ("system_unused",)), ("", ())):
        example = read({**row, "system": column})
        assert conversation(example) == [tuple(row["messages"])] and example.notes == notes
    assert conversation(read({"messages": [a("x")], "system": "b"})) == [(s("b"), a("x"))]
    assert refused({**row, "system": 3}).reason == "wrong_type"
    assert refused({"messages": [u("q"), a("x")], "system": "b", "system_prompt": "c"}).reason == "wrong_shape"
    assert refused({"messages": [u("q"), a("x")], "system": "b\0"}).reason == "nul_character"
    # a column that is named as something else is that; a text without turns is whole
    assert read({"system": "q", "completion": "x"}, prompt="system").prompt == "q"
    assert read({"text": "x", "system": "b"}) == Example("", ("x",), HERE)


# ---- JSON as text

MESSAGES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


@pytest.mark.parametrize("write", [json.dumps, str, lambda value: json.dumps(value, indent=2)])
@pytest.mark.parametrize(("rows", "row"), SHAPES)
def test_messages_as_json_text_are_read(rows: RowShape, row: Row, write: Callable[[Any], str]) -> None:
    text = {key: write(value) if key in MESSAGES and isinstance(value, list) else value for key, value in row.items()}
    example = read(text, rows)
    plain = read(row, rows)
    assert (example.prompt, example.completions, example.label) == (plain.prompt, plain.completions, plain.label)
    assert example.notes == (() if text == row else ("messages_as_json",))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '[{"name": "x", "content": "y"}]',
        '{"role": "engineer", "content": "builds bridges"}',
        '[{"role": "user", "content": "q"}] is how a conversation is written.',
        '{"content": "y"}',
        "[]",
        '"role"',
        "[{role",
    ],
)
def test_other_json_is_text(text: str) -> None:
    assert read({"prompt": "q", "completion": text}) == Example("q", (text,), HERE)


def test_messages_that_cannot_be_read_are_refused_and_not_trained_as_text() -> None:
    array = str(np.array([u("q"), a("x")], dtype=object))
    refusal = refused({"prompt": "q", "chosen": array, "rejected": "y"}, "pair")
    assert refusal.reason == "invalid_json" and "json.dumps" in refusal.fix
    assert refused({"prompt": "q", "completion": json.dumps(a("x"))}).reason == "wrong_type"
    deep = "[" * 100_000
    assert refused({"prompt": "q", "completion": f'[{{"role": {deep}]'}).reason == "invalid_json"


def test_tools_as_json_text_keep_their_nulls() -> None:
    tool = {"name": "f", "parameters": {"default": None}}
    for row in ({"messages": [u("q"), a("x")]}, {"conversations": SHAREGPT}, {"prompt": "q", "completion": "x"}):
        assert read({**row, "tools": json.dumps([tool])}).tools == (tool,)
        assert read({**row, "tools": " "}).tools is None
        assert refused({**row, "tools": "f()"}).reason == "wrong_type"


def test_calls_and_single_tools_as_json_text_are_read() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": None}}}]
    row = {"messages": [u("q"), a("", tool_calls=calls)], "tools": [{"name": "f", "default": None}]}
    text = {
        "messages": [u("q"), a("", tool_calls=json.dumps(calls))],
        "tools": [json.dumps(tool) for tool in row["tools"]],
    }
    assert read(text) == read(row)
    assert read({"messages": [u("q"), a("x", tool_calls="[]")]}) == read({"messages": [u("q"), a("x")]})
    for broken in ("f()", "[", '["f"]'):
        assert refused({"messages": [u("q"), a("", tool_calls=broken)]}).reason == "wrong_type"
    assert refused({**row, "tools": ["f()"]}).reason == "wrong_type"


# ---- labels


def test_a_conversation_with_a_label_is_read_for_kto() -> None:
    turns = [s("b"), u("q"), a("x"), u("r"), a("y")]
    for label in (True, False):
        example = read({"messages": turns, "label": label}, "labelled")
        assert example == Example(tuple(turns[:4]), ((a("y"),),), HERE, label=label)
    assert refused({"messages": turns, "label": None}, "labelled").reason == "null_field"
    assert refused({"messages": turns, "label": "good"}, "labelled").reason == "wrong_type"
    assert refused({"messages": [u("q")], "label": True}, "labelled").reason == "role_order"
    assert read({"messages": turns, "kto_tag": True}, "labelled", label="kto_tag").label is True


@pytest.mark.parametrize("label", [True, False, "true", "False"])
@pytest.mark.parametrize(("rows", "row"), [case for case in SHAPES if case[0] == "single"])
def test_no_labelled_row_is_trained_by_sft(rows: RowShape, row: Row, label: Any) -> None:
    if "inputs" in row:  # a DataRecord has no other columns
        return
    refusal = refused({**row, "label": label}, rows)
    assert refusal.reason == "wrong_shape" and "method: kto" in refusal.fix
    assert read({**row, "label": 3}, rows) == read(row, rows)  # a class, a rating


def test_advice_does_not_lead_to_training_what_nobody_should_imitate() -> None:
    refusal = refused({"messages": [u("q"), a("x")], "rating": 1}, "labelled")
    assert refusal.reason == "wrong_shape" and "--label-column" in refusal.fix and "only if" in refusal.fix


# ---- turns that are not trained


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0}])
def test_a_turn_that_is_not_to_be_trained_says_so_by_one_key(mark: Row) -> None:
    turns = [u("q"), a("bad", **mark), u("r"), a("x")]
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad", **mark}, *[
        {"from": "human", "value": "r"}, {"from": "gpt", "value": "x"}
    ]]  # fmt: skip
    for row in ({"messages": turns}, {"conversations": shared}, {"messages": json.dumps(turns)}):
        example = read(row)
        assert example.prompt == (u("q"),)
        assert example.completions == ((a("bad", train=False), u("r"), a("x")),)
    # in a prompt, nothing is trained anyway
    row = {"prompt": turns[:3], "chosen": [a("x")], "rejected": [a("y")]}
    assert read(row, "pair").prompt == (u("q"), a("bad"), u("r"))
    row = {"chosen": turns, "rejected": [u("q"), a("bad"), u("r"), a("y")]}
    assert read(row, "pair") == read({**row, "chosen": [u("q"), a("bad"), u("r"), a("x")]}, "pair")


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"weight": None}])
def test_a_turn_that_is_to_be_trained_is_like_any_other(mark: Row) -> None:
    assert read({"messages": [u("q"), a("x", **mark)]}) == read({"messages": [u("q"), a("x")]})


@pytest.mark.parametrize(
    "turn",
    [
        a("x", weight=0.5),
        a("x", weight=2),
        a("x", weight="0"),
        a("x", loss=float("nan")),
        a("x", train="false"),
        a("x", weight=1, train=False),
    ],
)
def test_other_weights_are_refused(turn: Row) -> None:
    assert refused({"messages": [u("q"), turn]}).reason == "wrong_type"


def test_weights_of_turns_that_are_never_trained() -> None:
    for mark in ({"weight": 0}, {"weight": 1}, {"train": False}):
        assert read({"messages": [u("q", **mark), a("x")]}) == read({"messages": [u("q"), a("x")]})
    for mark in ({"train": True}, {"loss": True}):
        assert refused({"messages": [u("q", **mark), a("x")]}).reason == "wrong_type"
    assert refused({"messages": [u("q"), a("x", weight=0)]}).reason == "nothing_labelled"
    assert refused({"messages": [u("q"), a("x", weight=0)], "label": True}, "labelled").reason == "nothing_labelled"


# ---- turns behind the last answer

TALKS: list[tuple[RowShape, Row, Row]] = [
    ("single", {"messages": [u("q"), a("x"), u("r")]}, {"messages": [u("q"), a("x")]}),
    ("single", {"prompt": "q", "completion": [a("x"), u("r")]}, {"prompt": "q", "completion": [a("x")]}),
    ("single", {"conversations": [*SHAREGPT, SHAREGPT[0]]}, {"conversations": SHAREGPT}),
    ("labelled", {"messages": [u("q"), a("x"), u("r")], "label": True}, {"messages": [u("q"), a("x")], "label": True}),
    (
        "pair",
        {"chosen": [u("q"), a("x"), u("r")], "rejected": [u("q"), a("y")]},
        {"chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]},
    ),
]


@pytest.mark.parametrize(("rows", "row", "without"), TALKS)
def test_a_turn_that_nothing_answers(rows: RowShape, row: Row, without: Row) -> None:
    refusal = refused(row, rows)
    assert refusal.reason == "trailing_turn" and "on_trailing_user: drop" in refusal.fix
    dropped = read(row, rows, drops_trailing=True)
    assert dropped.notes == ("trailing_turns",) and dropped.notes[0] in COUNTERS
    assert (dropped.prompt, dropped.completions) == (read(without, rows).prompt, read(without, rows).completions)


# ---- parts that are not text


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "q"}, {"type": "image"}],
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "input_audio", "input_audio": {"data": "x"}}],
        [{"type": "text", "text": "q", "image": "x.png"}],
    ],
)
def test_parts_that_are_not_text_are_refused_by_name(content: Any) -> None:
    refusal = refused({"messages": [u(content), a("x")]})
    assert refusal.reason == "unsupported_modality" and "content[" in refusal.found
    filled = [{"type": "text", "text": "q", "image": None, "image_url": None}]  # as Arrow fills them
    assert read({"messages": [u(filled), a("x")]}).prompt == (u("q"),)


@pytest.mark.parametrize("key", ["images", "audio", "videos", "refusal", "function_call", "train_detail"])
def test_parts_of_a_message_that_would_be_lost_are_refused_by_name(key: str) -> None:
    refusal = refused({"messages": [u("q"), a("x", **{key: ["p"]})]})
    assert refusal.reason == "unsupported_modality" and key in refusal.found
    assert read({"messages": [u("q"), a("x", **{key: None})]}) == read({"messages": [u("q"), a("x", **{key: []})]})


@pytest.mark.parametrize(("rows", "row"), SHAPES)
def test_a_text_that_points_to_an_image_is_refused(rows: RowShape, row: Row) -> None:
    text = json.loads(json.dumps(row).replace('"q"', '"<image> q"').replace("Human: q", "Human: <image> q"))
    for images in (["a.png"], b"", "a.png"):
        assert refused({**text, "images": images}, rows).reason == "unsupported_modality"
    for nothing in ({}, {"images": []}, {"images": None}):
        assert read({**text, **nothing}, rows)
    beside, plain = read({**row, "images": ["a.png"]}, rows), read(row, rows)  # a column that nothing points to
    assert replace(beside, notes=()) == plain and beside.notes == ("media_unread",)


# ---- names


def test_prompts_of_another_name_go_with_every_shape() -> None:
    pair = {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "y"}}
    plain = read(pair, "pair")
    for name in ("conversations", "task", "question"):
        assert read(pair, "pair", prompt=name) == plain
    assert read({"messages": [u("q")], "good": "x", "bad": "y"}, "pair", chosen="good", rejected="bad") == plain


def test_alpaca() -> None:
    row = {"instruction": "q", "input": "more", "output": "x", "text": "Below is an instruction ..."}
    assert read(row) == Example("q\n\nmore", ("x",), HERE)
    for nothing in ("", "\n", None):
        assert read({**row, "input": nothing}) == Example("q", ("x",), HERE)
    assert read({"instruction": "q", "context": "c", "response": "x"}) == Example("q\n\nc", ("x",), HERE)
    assert read(row, prompt="instruction", completion="output") == read(row)
    assert conversation(read({**row, "history": [["a", "b"]]})) == [(u("a"), a("b"), u("q\n\nmore"), a("x"))]
    assert conversation(read({**row, "history": '[["a", "b"]]', "system": "s"}))[0][:2] == (s("s"), u("a"))
    assert refused({**row, "history": ["a"]}).reason == "wrong_type"
    assert refused({**row, "input": ["a"]}).reason == "wrong_type"
    assert refused({**row, "instruction": " "}).reason == "empty_field"


@pytest.mark.parametrize(
    ("rows", "row", "flags"),
    [
        ("single", {"task": "q", "solution": "x"}, ["--prompt-column", "--completion-column"]),
        ("single", {"prompt": "q", "solution": "x"}, ["--completion-column"]),
        ("pair", {"prompt": "q", "good": "x", "bad": "y"}, ["--chosen-column", "--rejected-column"]),
        ("pair", {"task": "q", "chosen": "x", "rejected": "y"}, ["dataset.prompt_column"]),
        ("labelled", {"prompt": "q", "completion": "x", "ok": True}, ["--label-column"]),
    ],
)
def test_unknown_names_are_answered_by_those_there_are_and_the_flags(
    rows: RowShape, row: Row, flags: list[str]
) -> None:
    refusal = refused(row, rows)
    assert refusal.reason == "missing_field"
    assert all(flag in refusal.fix for flag in flags), refusal.fix
    if rows != "pair" or "good" in row:
        assert all(repr(name) in refusal.found for name in row)


# ---- what a template leaves out

READS_MOOD = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + (m.mood or '') + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("turns", "left_out"),
    [
        ([u("q"), a("x")], ()),
        ([u("q", lang="en"), a("x")], ("'lang' of turn 1",)),
        ([u("q", lang="en", id=3), a("x", lang="en")], ("'lang' of turn 1", "'id' of turn 1", "'lang' of turn 2")),
        ([u("q", mood="glad "), a("x")], ()),
        ([u("q", mood="glad ", lang="en"), a("x")], ("'lang' of turn 1",)),
        ([u("q", lang="", files=[], at=None), a("x", tool_call_id="1")], ()),
        ([u("q"), a("x", said={"by": "me"})], ("'said' of turn 2",)),
    ],
)
def test_keys_of_messages_that_the_template_does_not_read_are_named(
    turns: list[Row], left_out: tuple[str, ...], make_tokenizer: Callable[..., Any]
) -> None:
    (rendered,) = Renderer(make_tokenizer(template=READS_MOOD)).render(read({"messages": turns}))
    assert rendered.left_out == left_out and rendered.has_unread_keys == bool(left_out)


@pytest.mark.parametrize("name", ["x", "start", "Zaphod"])
def test_a_name_that_the_template_does_not_write_is_refused(name: str, make_tokenizer: Callable[..., Any]) -> None:
    """Also one whose letters stand somewhere else in the text."""
    row = {"messages": [u("is x a start?", name=name), a("x")]}
    with pytest.raises(RowRefused, match=r"dropped_by_template(.|\n)*the name"):
        Renderer(make_tokenizer()).render(read(row))
    reads = READS_MOOD.replace("m.mood", "m.name")
    (rendered,) = Renderer(make_tokenizer(template=reads)).render(read(row))
    assert name in rendered.text and not rendered.left_out


NAMES_ONLY = READS_MOOD.replace(
    "+ m['content'] +",
    "+ (m['content'] or '') + (m.tool_calls | map(attribute='function.name') | join if m.tool_calls else '') +",
)


def test_calls_without_their_arguments_are_refused(make_tokenizer: Callable[..., Any]) -> None:
    for function, is_lost in (({"name": "f", "arguments": {"a": 1}}, True), ({"name": "f", "arguments": {}}, False)):
        row = {"messages": [u("q"), a("", tool_calls=[{"function": function}])]}
        if is_lost:
            with pytest.raises(RowRefused, match="leaves the arguments"):
                Renderer(make_tokenizer(template=NAMES_ONLY)).render(read(row))
        else:
            Renderer(make_tokenizer(template=NAMES_ONLY)).render(read(row))
    row = {"messages": [u("q"), a("", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}])]}
    whole = NAMES_ONLY.replace("map(attribute='function.name') | join", "tojson")
    (rendered,) = Renderer(make_tokenizer(template=whole)).render(read(row))
    assert '"a": 1' in rendered.text


@pytest.mark.parametrize(
    "key", ["reasoning_content", "reasoning", "thinking", "thought", "thoughts", "cot", "chain_of_thought", "rationale"]
)
@pytest.mark.parametrize("value", ["hm", [{"type": "text", "text": "hm"}]])
def test_reasoning_is_read_under_each_of_its_keys(key: str, value: Any, make_tokenizer: Callable[..., Any]) -> None:
    """And refused by a template that has no place for it."""
    row = {"messages": [u("q"), a("x", **{key: value})]}
    thinks = READS_MOOD.replace("m.mood", "m.reasoning_content")
    (rendered,) = Renderer(make_tokenizer(template=thinks)).render(read(row))
    assert "hmx" in rendered.text
    with pytest.raises(RowRefused, match="leaves the reasoning"):
        Renderer(make_tokenizer()).render(read(row))


def test_reasoning_twice_is_one_or_refused() -> None:
    once = read({"messages": [u("q"), a("x", reasoning_content="hm")]})
    details = [{"type": "reasoning.text", "text": "hm"}]
    for more in ({"reasoning": "hm"}, {"reasoning": ""}, {"reasoning": "hm", "reasoning_details": details}):
        assert read({"messages": [u("q"), a("x", reasoning_content="hm", **more)]}) == once
    assert refused({"messages": [u("q"), a("x", reasoning_content="hm", reasoning="no")]}).reason == "wrong_shape"
    for more in ({"reasoning_details": details}, {"thinking_blocks": details}):
        assert refused({"messages": [u("q"), a("x", **more)]}).reason == "unsupported_modality"
    for value in (3, True, {"a": 1}, ["hm"], "a\0"):
        found = refused({"messages": [u("q"), a("x", reasoning_content=value)]})
        assert found.reason in ("wrong_type", "nul_character")


@pytest.mark.parametrize("nothing", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": " "}])
def test_a_call_without_arguments_has_none(nothing: Row) -> None:
    for wrap in (lambda function: {"function": function}, lambda function: function):
        row = {"messages": [u("q"), a("", tool_calls=[wrap({"name": "f", **nothing})])]}
        (turn,) = read(row).completions[0]
        assert turn["tool_calls"] == [wrap({"name": "f", "arguments": {}})]  # type: ignore[index]


@pytest.mark.parametrize("value", [{"a": 1}, '{"a": 1}'])
def test_arguments_under_the_name_of_parameters_are_read(value: Any) -> None:
    row = {"messages": [u("q"), a("", tool_calls=[{"function": {"name": "f", "parameters": value}}])]}
    (turn,) = read(row).completions[0]
    assert turn["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]  # type: ignore[index]


def test_messages_under_the_name_of_conversations_are_messages() -> None:
    turns = [u("q"), a("x"), u("r"), a("y", weight=0)]
    assert read({"conversations": turns}) == read({"messages": turns})
    pair = {"conversations": [u("q")], "chosen": [a("x")], "rejected": [a("y")]}
    assert read(pair, "pair") == read({"messages": [u("q")], "chosen": "x", "rejected": "y"}, "pair")
    assert refused({"conversations": [u("q"), {"from": "gpt", "value": "x"}]}).reason == "wrong_type"


@pytest.mark.parametrize("column", ["image", "images", "audio", "videos"])
def test_media_that_no_text_points_to_are_counted(column: str) -> None:
    row = {"messages": [u("q"), a("x")]}
    for value in (b"", ["a.png"], {"path": "a.wav"}):
        assert read({**row, column: value}).notes == ("media_unread",)
    for value in (None, [], ""):
        assert read({**row, column: value}).notes == ()
    pointed = {"messages": [u("<image>q"), a("x")], column: ["a.png"]}
    assert refused(pointed).reason == "unsupported_modality"


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "train_turn", "loss", "loss_weight"])
def test_every_key_that_says_what_is_trained_is_read(key: str) -> None:
    for value, is_trained in ((0, False), (False, False), (1, True), (True, True)):
        turn = read({"messages": [u("q"), a("x", **{key: value}), u("r"), a("y")]}).completions[0][0]
        assert ("train" in turn) is not is_trained  # type: ignore[operator]
    assert refused({"messages": [u("q"), a("x", **{key: 0.5})]}).reason == "wrong_type"
    asks = {"messages": [u("q", **{key: 1}), a("x")]}  # a weight stands on every turn of some files
    assert read(asks) if "weight" in key else refused(asks).reason == "wrong_type"
