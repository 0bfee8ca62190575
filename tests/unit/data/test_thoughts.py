"""Thoughts between `<think>` tags in contents: under templates that read a key, beside a key, and twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rows import HERE, Row, a, read, refused, u
from strop.data.text.message_forms import looks_for_thoughts, outer_tags, reasoning_keys, thought_and_words
from strop.data.text.render import Rendered, Renderer, TextRules
from strop.types import Example

Make = Callable[..., Any]

HEAD = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
END = "{{ m['content'] + '<|end|>' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"

IN_A_CHANNEL = HEAD + "{% if m.thinking %}{{ '(' + m.thinking + ')' }}{% endif %}" + END + ASKS
"""gpt-oss: reasoning has a place of its own, and tags in a content are words."""

IN_TAGS = HEAD + "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}" + END + ASKS
"""Kimi K2 Thinking: each answer has a thought between tags, and those of a content come behind it."""

IN_A_CHANNEL_BESIDE_CALLS = IN_A_CHANNEL.replace("if m.thinking", "if m.thinking and m.tool_calls")
"""Gemma 4: reasoning in an answer has no place."""

ONLY_OF_THE_LAST = IN_A_CHANNEL.replace("if m.thinking", "if m.thinking and loop.last")

THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.fixture
def render(make_tokenizer: Make) -> Callable[..., Rendered]:
    def rendered(template: str, *turns: Row) -> Rendered:
        example = Example(turns[:1], (turns[1:],), HERE)
        (one,) = Renderer(make_tokenizer(template=template), TextRules()).render(example)
        return one

    return rendered


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.trained]


def test_a_thought_in_a_content_goes_where_the_template_has_reasoning(render: Callable[..., Rendered]) -> None:
    assert trained(render(IN_A_CHANNEL, u("q"), a(THOUGHT + "x"))) == ["(hm)x<|end|>"]
    assert trained(render(IN_TAGS, u("q"), a(THOUGHT + "x"))) == ["<think>hm</think>x<|end|>"]
    two = u("q"), a(THOUGHT + "x"), u("r"), a("y", reasoning_content="ha")
    assert trained(render(IN_TAGS, *two)) == ["<think>hm</think>x<|end|>", "<think>ha</think>y<|end|>"]


def test_an_empty_thought_in_a_content_is_none(render: Callable[..., Rendered]) -> None:
    empty = a("<think>\n\n</think>\n\nx")
    assert trained(render(IN_TAGS, u("q"), empty)) == ["<think></think>x<|end|>"]
    asks_for_the_key = IN_A_CHANNEL.replace("if m.thinking", "if 'thinking' in m")
    assert trained(render(asks_for_the_key, u("q"), empty)) == ["x<|end|>"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_a_user_is_a_key_that_no_template_needs(key: str, render: Callable[..., Rendered]) -> None:
    found = render(
        IN_A_CHANNEL.replace("if m.thinking", "if m.thinking and m.role == 'assistant'"), u("q", **{key: "hm"}), a("x")
    )
    assert trained(found) == ["x<|end|>"] and found.left_out == (f"{key!r} of turn 1",)


def test_a_thought_that_the_template_has_no_place_for_stays_in_the_content(render: Callable[..., Rendered]) -> None:
    found = render(IN_A_CHANNEL_BESIDE_CALLS, u("q"), a(THOUGHT + "x"))
    assert trained(found) == [THOUGHT + "x<|end|>"] and not found.left_out


def test_the_sides_of_a_pair_have_the_same_prompt(make_tokenizer: Make) -> None:
    prompt = u("q"), a(THOUGHT + "x"), u("r")
    example = Example(prompt, ((a(THOUGHT + "y"),), (a("z"),)), HERE)
    one, other = Renderer(make_tokenizer(template=IN_A_CHANNEL_BESIDE_CALLS), TextRules()).render(example)
    assert one.text[: one.boundary] == other.text[: other.boundary] and THOUGHT in one.text[: one.boundary]
    assert trained(one) == [THOUGHT + "y<|end|>"] and trained(other) == ["z<|end|>"]


def test_or_it_is_dropped_where_the_configuration_says_so(make_tokenizer: Make) -> None:
    rules = TextRules(on_dropped_reasoning="drop")
    example = Example((u("q"),), ((a(THOUGHT + "x"),),), HERE)
    (found,) = Renderer(make_tokenizer(template=IN_A_CHANNEL_BESIDE_CALLS), rules).render(example)
    assert trained(found) == ["x<|end|>"] and found.num_dropped_reasoning == 1


def test_a_thought_that_moves_and_is_dropped_later_is_history(render: Callable[..., Rendered]) -> None:
    found = render(ONLY_OF_THE_LAST, u("q"), a(THOUGHT + "x"), u("r"), a(THOUGHT + "y"))
    assert trained(found) == ["(hm)y<|end|>"]
    assert found.num_history == 1 and found.left_out == ("the reasoning of turn 2",)


@pytest.mark.parametrize(
    "content", ["x </think> y", "hm</think>x", "x <think>hm</think> y", "<think>hm", "<thinking>x"]
)
def test_other_tags_are_words(content: str, render: Callable[..., Rendered]) -> None:
    assert trained(render(IN_A_CHANNEL, u("q"), a(content))) == [content + "<|end|>"]


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("{% if '</think>' in m.content %}", True),
        ("{% if '<think>' not in m.content %}", True),
        ("{{ m.content.split('</think>')[-1] }}", True),
        ('{% set close = "</think>" %}', True),
        ("{{ '<think>' + m.reasoning_content + '</think>' }}", False),
        ("<think>{{ m.reasoning_content }}</think>", False),
        ("{# '</think>' in content #}", False),
    ],
)
def test_templates_that_ask_for_tags_are_known(question: str, asks: bool) -> None:
    assert looks_for_thoughts(question) is asks


def test_templates_that_ask_for_the_ends_of_a_content_are_known() -> None:
    asks = "{% if m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}"
    assert outer_tags(asks) == (("<tool_response>", "</tool_response>"),)
    assert outer_tags("{% if m.content.endswith('/nothink') or m.content.endswith('</a>') %}") == ()
    assert reasoning_keys(IN_A_CHANNEL) == ("thinking",)


def test_a_thought_and_the_words_behind_it() -> None:
    assert thought_and_words(THOUGHT + "x") == ("hm", "x")
    assert thought_and_words("hm</think>x") == ("hm", "x")
    assert thought_and_words("x") is thought_and_words("a<think>hm</think>x") is thought_and_words(2 * THOUGHT) is None


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
@pytest.mark.parametrize("content", [THOUGHT + "x", "hm</think>x", "<think>hm</think>x"])
def test_a_thought_that_a_row_has_twice_is_one(key: str, content: str) -> None:
    example = read({"messages": [u("q"), a(content, **{key: " hm\n"})]})
    assert example.completions == (({"role": "assistant", "content": content},),)


def test_an_empty_thought_beside_a_key_is_none() -> None:
    example = read({"messages": [u("q"), a("<think>\n\n</think>\n\nx", thinking="hm")]})
    assert example.completions == (({"role": "assistant", "content": "x", "thinking": "hm"},),)


def test_two_thoughts_that_differ_are_refused() -> None:
    refusal = refused({"messages": [u("q"), a(THOUGHT + "x", reasoning_content="ha")]})
    assert refusal.reason == "wrong_shape" and refusal.expected == "the reasoning of a turn in one place"
    assert refusal.found.startswith("messages[1] has reasoning under reasoning_content and between <think> tags")


def test_the_name_of_a_tool_that_no_call_has_is_told(render: Callable[..., Rendered]) -> None:
    template = (
        HEAD + "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|end|>"
    )
    template += "{% endfor %}" + ASKS
    call = a("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}])
    result = {"role": "tool", "content": "2", "name": "add"}
    assert render(template, u("q"), call, result, a("x")).left_out == ()
    assert render(template, u("q"), call, {**result, "name": "mul"}, a("x")).left_out == ("'name' of turn 3",)
