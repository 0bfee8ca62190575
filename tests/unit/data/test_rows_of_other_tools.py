"""Rows as other tools and older formats have them: read as what they mean, or refused or counted by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from rows import HERE, Row, a, read, refused, u
from strop.data.counters import COUNTERS
from strop.data.read.arrow import RowMaker
from strop.data.read.row import RowRefused
from strop.data.text.render import Renderer
from strop.types import Example, RowShape

PLAIN = {"messages": [u("q"), a("x")]}

# ---- messages as JSON text


@pytest.mark.parametrize("first", [{"id": 1}, {"weight": 1}, {"name": None}, {}])
@pytest.mark.parametrize(
    "write", [json.dumps, str, lambda v: json.dumps(json.dumps(v)), lambda v: "\ufeff" + json.dumps(v)]
)
def test_messages_as_text_are_read_whatever_their_first_key_is(first: Row, write: Callable[[Any], str]) -> None:
    turns = [[{**first, **turn}] for turn in (u("q"), a("x"), a("y"))]
    pair = dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))
    example = read({key: write(value) for key, value in pair.items()}, "pair")
    plain = read(pair, "pair")
    assert (example.prompt, example.completions) == (plain.prompt, plain.completions)
    assert example.notes == ("messages_as_json",)
    shared = [{**first, "from": "human", "value": "q"}, {**first, "from": "gpt", "value": "x"}]
    assert read({"conversations": write(shared)}).completions == read({"conversations": shared}).completions


@pytest.mark.parametrize(
    "text",
    [
        '[{"id": 1, "role": "engineer", "content": "builds bridges"}]',
        '[{"id": 1, "from": "EUR", "value": 3}]',
        '{"id": 1, "role": "user"}',
        '[{"id": 1, "role": "user", "content": "q"}] is how it is written.',
        '"[{"',
        "\"a text in quotes, with 'role': in it\"",
        '{"name": "f", "arguments": {"role": "user"}}',
    ],
)
def test_other_objects_as_text_stay_text(text: str) -> None:
    assert read({"prompt": "q", "completion": text}) == Example("q", (text,), HERE)


@pytest.mark.parametrize("names", [("question", "answer"), ("instruction", "output"), ("question", "response")])
def test_messages_as_text_are_never_trained_as_text_under_any_name(names: tuple[str, str]) -> None:
    asked, answered = names
    turns = json.dumps([a("x")])
    assert read({asked: "q", answered: turns}).completions == ((a("x"),),)
    refusal = refused({asked: json.dumps([u("q")]), answered: turns})
    assert refusal.reason == "missing_field" and "--prompt-column" in refusal.fix
    named = {"prompt": asked, "completion": answered}
    assert read({asked: json.dumps([u("q")]), answered: turns}, **named).prompt == (u("q"),)


@pytest.mark.parametrize("write", [json.dumps, str])
def test_answers_of_a_group_as_json_text_are_messages(write: Callable[[Any], str]) -> None:
    row = {"prompt": [u("q")], "completions": [[a("x")], [a("y")]], "rewards": [1, 0]}
    written = {"prompt": write(row["prompt"]), "completions": [write(turns) for turns in row["completions"]]}
    for columns in (written, {**written, "completions": json.dumps(written["completions"])}):
        example = read({**row, **columns}, "group")
        assert example.completions == ((a("x"),), (a("y"),)) and example.notes == ("messages_as_json",)
    words = {**row, "completions": ["[1]", '[{"name": "x"}]']}
    assert [turns[0]["content"] for turns in read(words, "group").completions] == words["completions"]
    assert refused({**row, "completions": [str([a("x")])[:-2] + "}", "y"]}, "group").reason == "invalid_json"


def test_tools_and_calls_as_python_prints_them_are_read() -> None:
    """As pandas writes lists into a CSV file."""
    call, tool = {"name": "f", "arguments": {"b": None}}, {"name": "f", "parameters": {}}
    row = {"messages": [u("q"), a("", tool_calls=[call]), a("x")], "tools": [tool]}
    printed = {"messages": str([u("q"), a("", tool_calls=str([call])), a("x")]), "tools": str([tool])}
    example, plain = read(printed), read(row)
    assert (example.prompt, example.completions, example.tools) == (plain.prompt, plain.completions, plain.tools)
    assert refused({**row, "tools": "[f(x)]"}).reason == "wrong_type"


@pytest.mark.parametrize(
    ("rows", "row", "expected"),
    [
        ("labelled", {"messages": [u("q"), a("x")], "label": None}, "true or 1"),
        ("labelled", {"prompt": "q", "completion": None, "label": True}, "a text or a list"),
        ("single", {"messages": [u("q"), a(None)]}, "a text"),
        ("group", {"prompt": "q", "completions": None, "rewards": [1]}, "list of answers"),
    ],
)
def test_a_null_says_what_should_be_there(rows: RowShape, row: Row, expected: str) -> None:
    refusal = refused(row, rows)
    assert refusal.reason == "null_field" and expected in refusal.expected


# ---- labels


@pytest.mark.parametrize(
    ("value", "label"),
    [(1, True), (0, False), (1.0, True), ("1", True), ("0", False), ("TRUE", True), (" false", False), (True, True)],
)
def test_labels_are_truths_numbers_or_words(value: Any, label: bool) -> None:
    for row in ({"prompt": "q", "completion": "x"}, PLAIN, {"messages": [u("q")], "completion": "x"}):
        assert read({**row, "label": value}, "labelled").label is label
        refusal = refused({**row, "label": value})
        assert refusal.reason == "wrong_shape" and "method: kto" in refusal.fix
    assert refused({**PLAIN, "label": value}, "pair").fix.endswith("kto")


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", "desirable", [True], {"a": 1}, ""])
def test_other_labels_are_refused_by_kto_and_mean_nothing_to_sft(value: Any) -> None:
    assert refused({**PLAIN, "label": value}, "labelled").reason in ("wrong_type", "null_field")
    assert read({**PLAIN, "label": value}) == read(PLAIN)


def test_a_kto_tag_is_a_label() -> None:
    for value in (True, False):
        refusal = refused({**PLAIN, "kto_tag": value})
        assert refusal.reason == "wrong_shape" and "kto_tag" in refusal.found
        assert read({**PLAIN, "kto_tag": value}, "labelled", label="kto_tag").label is value
        assert "--label-column" in refused({**PLAIN, "kto_tag": value}, "labelled").fix


# ---- an answer beside the conversation that leads up to it


@pytest.mark.parametrize("turns", [{"messages": [u("q")]}, {"conversations": [{"from": "human", "value": "q"}]}])
def test_a_conversation_without_an_answer_leads_up_to_the_completion(turns: Row) -> None:
    for row in ({**turns, "completion": "x"}, {**turns, "completion": [a("x")]}):
        assert read(row) == Example((u("q"),), ((a("x"),),), HERE)
        assert read({**row, "label": True}, "labelled").completions == ((a("x"),),)
    assert refused(turns).reason == "role_order"
    assert read({**PLAIN, "completion": "y"}) == read(PLAIN)  # messages that are answered are the row


# ---- OpenAI's old form

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
OLD = {
    "messages": [
        u("q"),
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": null}'}},
        {"role": "function", "name": "f", "content": "r"},
        a("x"),
    ],
    "functions": [FUNCTION],
}


def test_calls_and_tools_in_their_old_form_are_read() -> None:
    example = read(OLD)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    assert example.completions == (
        ({"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "f", "content": "r"}, a("x")),
    )
    assert example.tools == (FUNCTION,)
    assert read({**OLD, "functions": json.dumps([FUNCTION])}) == example
    assert read({**OLD, "tools": [{"type": "function", "function": FUNCTION}]}).tools != (FUNCTION,)


@pytest.mark.parametrize("value", ["def f(): pass", "[1]", ["f"], [{"f": 1}], 3, [], "", None])
def test_a_column_of_other_functions_is_not_looked_at(value: Any) -> None:
    assert read({**PLAIN, "functions": value}) == read(PLAIN)


@pytest.mark.parametrize("value", [["f"], "f", {"name": 3}, {"arguments": "{}"}])
def test_old_calls_that_cannot_be_meant_are_refused(value: Any) -> None:
    refusal = refused({"messages": [u("q"), a("x", function_call=value)]})
    assert refusal.reason == "unsupported_modality" and "function_call" in refusal.found
    assert refused({"messages": [u("q", function_call={"name": "f"}), a("x")]}).reason == "unsupported_modality"


def test_arrow_adds_no_nulls_to_old_calls_and_tools() -> None:
    other = {**OLD, "messages": [u("q"), a("x", function_call={"name": "g", "arguments": None, "id": "1"})]}
    other["functions"] = [{"name": "g", "strict": True}]
    table = pa.Table.from_pylist([OLD, other])
    found = RowMaker(table.schema).rows(table)
    assert read(found[0]) == read(OLD)
    assert read(found[1]).tools == ({"name": "g", "strict": True},)


# ---- turns that are not trained


@pytest.mark.parametrize("key", ["masked", "ignore_loss", "skip_loss"])
def test_keys_that_say_what_is_not_trained(key: str) -> None:
    for value, is_trained in ((1, False), (True, False), (0, True), (False, True)):
        turn = read({"messages": [u("q", **{key: True}), a("x", **{key: value}), u("r"), a("y")]}).completions[0][0]
        assert ("train" in turn) is not is_trained  # type: ignore[operator]
        assert key not in turn  # type: ignore[operator]
    assert refused({"messages": [u("q"), a("x", **{key: "yes"})]}).reason == "wrong_type"
    assert refused({"messages": [u("q"), a("x", **{key: True})]}).reason == "nothing_labelled"
    assert refused({"messages": [u("q"), a("x", **{key: True}, weight=1)]}).reason == "wrong_type"


def test_a_mask_that_can_mean_either_is_refused() -> None:
    for value in (0, 1, True, [1, 0]):
        refusal = refused({"messages": [u("q"), a("x", mask=value)]})
        assert refusal.reason == "unsupported_modality" and "train" in refusal.expected


# ---- columns beside the turns


@pytest.mark.parametrize("column", ["reasoning", "reasoning_content", "thinking", "thought", "cot", "rationale"])
def test_a_column_of_reasoning_is_counted(column: str) -> None:
    for rows, row in (("single", PLAIN), ("single", {"prompt": "q", "completion": "x"})):
        assert read({**row, column: "since it is so"}, rows).notes == ("reasoning_unread",)  # type: ignore[arg-type]
        for other in ("on", "", None, True, 3, ["a b"]):
            assert read({**row, column: other}, rows).notes == ()  # type: ignore[arg-type]
    assert "reasoning_unread" in COUNTERS
    assert read({column: "why is it so", "completion": "x"}, prompt=column) == Example("why is it so", ("x",), HERE)


@pytest.mark.parametrize(
    "column", ["image_path", "IMAGE", "video_url", "audio_paths", "input_image", "img", "pictures"]
)
@pytest.mark.parametrize(
    "words", ["<image>", "<IMAGE>", "<image_1>", "<|image_1|>", "<start_of_image>", "[IMG]", "<image 2>"]
)
def test_a_text_that_points_to_a_picture_is_refused(column: str, words: str) -> None:
    row = {"messages": [u(f"{words} q"), a("x")], column: "a.png"}
    refusal = refused(row)
    assert refusal.reason == "unsupported_modality" and words in refusal.found and column in refusal.found
    assert read({**PLAIN, column: "a.png"}).notes == ("media_unread",)
    for nothing in (None, "", [], 0, False):
        assert read({**row, column: nothing}).notes == ()


@pytest.mark.parametrize("column", ["imagery", "image_caption", "num_words", "videogame", "images_described"])
def test_columns_of_words_about_pictures_are_no_pictures(column: str) -> None:
    assert read({"messages": [u("<image> q"), a("x")], column: "words"}).notes == ()


# ---- keys that are a part of their turn

NAMES_ROLES = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
READS_CHANNELS = NAMES_ROLES.replace("m['role'] +", "m['role'] + (m.channel or '') +")


@pytest.mark.parametrize("key", ["channel", "recipient", "tools", "functions"])
def test_a_part_of_a_turn_that_the_template_leaves_out_is_refused(key: str, make_tokenizer: Callable[..., Any]) -> None:
    value = [FUNCTION] if key in ("tools", "functions") else "analysis"
    row = {"messages": [u("q"), a("hm", **{key: value}), a("x")]}
    with pytest.raises(RowRefused, match=rf"dropped_by_template(.|\n)*the {key}"):
        Renderer(make_tokenizer(template=NAMES_ROLES)).render(read(row))


def test_channels_that_the_template_writes_are_trained(make_tokenizer: Callable[..., Any]) -> None:
    row = {"messages": [u("q"), a("hm", channel="analysis"), a("x", channel="final")]}
    (rendered,) = Renderer(make_tokenizer(template=READS_CHANNELS)).render(read(row))
    assert "analysis" in rendered.text
    (rendered,) = Renderer(make_tokenizer(template=NAMES_ROLES)).render(read({"messages": row["messages"][::2]}))
    assert rendered.has_unread_keys  # an answer is final anyway


def arguments_of(value: Any) -> Any:
    turn = a("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": value}}])
    (answer, *_) = read({"messages": [u("q"), turn]}).completions[0]
    assert not isinstance(answer, str)
    return answer["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("write", [json.dumps, str, lambda value: json.dumps(json.dumps(value))])
def test_arguments_are_an_object_however_their_text_was_written(write: Callable[[Any], str]) -> None:
    arguments = {"city": "Zürich", "of": {"it's": [1, None, True]}}
    assert arguments_of(write(arguments)) == arguments


@pytest.mark.parametrize("text", ["{bad}", '{"a": 1', '{"a": 1}}', "{1, 2}", '"{bad}"', "{'a': f(1)}"])
def test_arguments_that_look_like_an_object_and_are_none_are_refused(text: str) -> None:
    with pytest.raises(RowRefused) as refusal:
        arguments_of(text)
    assert refusal.value.reason == "invalid_json"
    assert refusal.value.found.startswith("messages[1].tool_calls[0].arguments is a text that looks like an object")


@pytest.mark.parametrize("text", ["print({'a': 1})", "1 + 1", "SELECT 1"])
def test_arguments_that_are_code_stay_code(text: str) -> None:
    assert arguments_of(text) == text


TWICE = '{"role": "assistant", "content": "x", "content": "y"}'


@pytest.mark.parametrize(
    "row",
    [
        {"messages": f'[{{"role": "user", "content": "q"}}, {TWICE}]'},
        {"prompt": "q", "completion": f"[{TWICE}]"},
        {"messages": [u("q"), a("x")], "tools": '[{"name": "f", "name": "g"}]'},
        {"messages": [u("q"), a("", tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}])]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "name": 1}'},
            ]
        },
    ],
)
def test_a_key_twice_in_json_text_is_refused_as_in_the_row_itself(row: Row) -> None:
    assert refused(row).reason == "duplicate_key"


def test_a_key_twice_in_a_text_that_is_no_message_is_text() -> None:
    text = '[{"role": "x", "role": "y"}]'
    assert read({"prompt": "q", "completion": text}).completions == (text,)


@pytest.mark.parametrize(
    "more", [{"function_call": {"name": None, "arguments": None}}, {"audio": {"id": None}}, {"images": {"url": None}}]
)
def test_objects_of_nulls_alone_say_nothing(more: Row) -> None:
    part = {"type": "text", "text": "q", "image_url": {"url": None}}
    assert read({"messages": [u([part]), a("x", **more)]}) == read({"messages": [u("q"), a("x")]})


@pytest.mark.parametrize("column", ["answer", "response", "output"])
def test_an_answer_that_is_no_text_is_named_as_the_row_names_it(column: str) -> None:
    refusal = refused({"question": "1 + 1?", column: 2})
    assert refusal.found.startswith(f"{column} is 2")


@pytest.mark.parametrize("column", ["answer", "solution", "completion"])
@pytest.mark.parametrize("value", [7, 0.5])
def test_a_number_that_rewards_compare_with_is_no_wrong_answer(column: str, value: float) -> None:
    questions = ("question", "prompt") if column == "answer" else ("prompt",)
    for question in questions:
        assert read({question: "3 + 4?", column: value}, "prompt").prompt == "3 + 4?"
    talk = {"messages": [u("3 + 4?")], column: value}
    assert read(talk, "prompt").prompt == (u("3 + 4?"),)
