"""What templates ask of a row before they write it: whether there is a thought, how a call is named, which turn is the
last. Each template is a short form of a real family's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rows import HERE, Row, a, refused, u
from strop.data.read.row import RowRefused
from strop.data.text.render import Rendered, Renderer, TextRules
from strop.types import Example

Make = Callable[..., Any]

HEAD = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"

THOUGHTS_IF_ANY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% set text = m['content'] or '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].strip('\n') %}"
    "{% if thought and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ text + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
"""MiniMax M2: a thought is written if there is one, and inference begins inside of it."""

CALLS_BY_ID = (
    HEAD + "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}"
    "{{ '(' + c['id'] + '|' + (c.function.arguments | tojson) + ')' }}{% endfor %}{{ '<|end|>' }}{% endfor %}" + ASKS
)
"""Kimi K2: the id of a call says which function it calls."""

CLOSES_NO_THOUGHT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|></think>' + m['content'].split('</think>', 1)[-1] + '</s>' }}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
"""DeepSeek V3.1: an answer is written as one without thoughts, whatever was asked for."""

CLOSED_IN_PROMPTS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>' + ((m.reasoning_content or '') if loop.last else '') + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think></think>' }}{% endif %}"
)
"""GLM 4.5 and Nemotron 3 with enable_thinking: false."""

JSON_CALLS_WITHOUT_TOOLS = (
    HEAD + "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}{# tools #}" + ASKS
)
"""Writes no tools, and fails on arguments that are no text."""


@pytest.fixture
def render(make_tokenizer: Make) -> Callable[..., Rendered]:
    def rendered(template: str, *turns: Row, drop: bool = False, **more: Any) -> Rendered:
        rules = TextRules(on_dropped_reasoning="drop" if drop else "refuse")
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        example = Example(turns[:first], (turns[first:],), HERE, **more)
        (one,) = Renderer(make_tokenizer(template=template), rules).render(example)
        return one

    return rendered


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.trained]


@pytest.mark.parametrize("thought", ["<think>\n\n</think>\n\n", "<think>\n</think>\n", "<think>\n \n</think>"])
def test_an_empty_thought_is_no_thought_to_the_template(thought: str, render: Callable[..., Rendered]) -> None:
    one = render(THOUGHTS_IF_ANY, u("q"), a(thought + "x"))
    assert one.text[: one.boundary] == "<|start|>user\nq<|end|>\n<|start|>assistant\n<think>\n"
    assert trained(one) == [thought.removeprefix("<think>\n") + "x<|end|>"] and one.is_generation_prompt
    # an earlier one, which the template leaves out, is history where the last one follows its prompt
    two = render(THOUGHTS_IF_ANY, u("q"), a(thought + "x"), u("r"), a(thought + "y"))
    assert trained(two) == [thought.removeprefix("<think>\n") + "y<|end|>"] and two.num_history == 1


def test_an_empty_thought_that_does_not_begin_as_the_prompt_ends_is_left_out(render: Callable[..., Rendered]) -> None:
    one = render(THOUGHTS_IF_ANY, u("q"), a("<think></think>x"))
    assert trained(one) == ["x<|end|>"] and not one.is_generation_prompt


def call(number: str, name: str = "add") -> Row:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {"a": 1}}}


@pytest.mark.parametrize("thought", ["", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("content", ["", "Let me see."])
def test_a_call_that_its_id_names_is_written(content: str, thought: str, render: Callable[..., Rendered]) -> None:
    calls = [call("functions.add:0"), call("functions.mul:1", "mul")]
    turn = a(thought + content, tool_calls=calls)
    found = render(CALLS_BY_ID, u("q"), turn, {"role": "tool", "content": "2"}, a("Two."))
    words = '(functions.add:0|{"a": 1})(functions.mul:1|{"a": 1})<|end|>'
    assert trained(found) == [thought + content + words, "Two.<|end|>"]
    assert trained(render(CALLS_BY_ID, u("q"), turn)) == [thought + content + words]


def test_the_call_that_nothing_names_is_the_one_that_is_refused(render: Callable[..., Rendered]) -> None:
    with pytest.raises(RowRefused, match="leaves a call of 'mul' in turn 2 out"):
        render(CALLS_BY_ID, u("q"), a("", tool_calls=[call("functions.add:0"), call("call_2", "mul")]))


@pytest.mark.parametrize("number", ["call_1", "functions.mul:0"])
def test_a_call_that_nothing_names_is_refused(number: str, render: Callable[..., Rendered]) -> None:
    with pytest.raises(RowRefused, match="leaves a call of 'add' in turn 2 out"):
        render(CALLS_BY_ID, u("q"), a("", tool_calls=[call(number)]))


@pytest.mark.parametrize("content", ["<think>hm</think>x", "hm</think>x", "<think></think>x"])
def test_thoughts_that_the_template_closes_unseen_follow_the_prompt(
    content: str, render: Callable[..., Rendered]
) -> None:
    one = render(CLOSES_NO_THOUGHT, u("q"), a(content), template_kwargs={"thinking": True})
    assert one.text[: one.boundary] == "<|user|>q<|assistant|><think>" and one.is_generation_prompt
    assert trained(one) == [content.removeprefix("<think>") + "</s>"]


def test_no_advice_to_begin_with_what_the_prompt_has_closed(render: Callable[..., Rendered]) -> None:
    with pytest.raises(RowRefused) as refusal:
        render(CLOSES_NO_THOUGHT, u("q"), a("<think>hm</think>x"))
    assert refusal.value.reason == "dropped_by_template" and "begins with" not in refusal.value.expected


def test_thoughts_in_a_content_are_dropped_where_the_configuration_says_so(render: Callable[..., Rendered]) -> None:
    one = render(CLOSES_NO_THOUGHT, u("q"), a("<think>hm</think>x"), drop=True)
    assert one.text[: one.boundary] == "<|user|>q<|assistant|></think>" and trained(one) == ["x</s>"]
    assert one.num_dropped_reasoning == 1 and one.left_out == ("the reasoning of turn 2",)


def test_a_last_answer_does_not_become_history_by_one_that_lost_its_thoughts(render: Callable[..., Rendered]) -> None:
    two = render(CLOSED_IN_PROMPTS, u("q"), a("x", reasoning_content="hm"), u("r"), a("y", reasoning_content="ha"))
    assert trained(two) == ["ha</think>y<|end|>"] and not two.is_generation_prompt and two.num_history == 1
    # an earlier one that follows its prompt is what is trained
    with pytest.raises(RowRefused, match="does not follow"):
        render(CLOSED_IN_PROMPTS.replace("<|end|>", ""), u("q"), a("x"), u("r"), a("y", reasoning_content="ha"))


def test_the_refusal_is_that_of_the_form_which_the_template_writes(render: Callable[..., Rendered]) -> None:
    tools = ({"type": "function", "function": {"name": "mul", "parameters": {}}},)
    turns = u("q"), a("", tool_calls=[call("call_1")])
    assert trained(render(JSON_CALLS_WITHOUT_TOOLS, *turns)) == ['add{"a": 1}<|end|>']
    with pytest.raises(RowRefused, match="leaves a tool, 'mul', out"):
        render(JSON_CALLS_WITHOUT_TOOLS, *turns, tools=tools)


@pytest.mark.parametrize("written", ["c", "c.function", "c | string"])
def test_no_call_is_trained_as_python_prints_it(written: str, render: Callable[..., Rendered]) -> None:
    template = JSON_CALLS_WITHOUT_TOOLS.replace("c.function.name + c.function.arguments", written)
    with pytest.raises(RowRefused, match="as Python does"):
        render(template, u("q"), a("", tool_calls=[call("call_1")]))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("blank", [" ", "\n", "\n\n"])
def test_white_space_is_no_reasoning(
    key: str, blank: str, render: Callable[..., Rendered], templates: dict[str, str]
) -> None:
    one = render(templates["chatml"], u("q"), a("x", **{key: blank}))
    assert trained(one) == ["x<|end|>"] and not one.left_out


@pytest.mark.parametrize("last", [a("y"), a("y", reasoning_content="ha")])
def test_what_follows_the_last_trained_answer_makes_no_history(last: Row, render: Callable[..., Rendered]) -> None:
    first = a("x", reasoning_content="hm")
    found = render(CLOSED_IN_PROMPTS.replace("<think></think>", ""), u("q"), first, u("r"), {**last, "train": False})
    assert trained(found) == ["<think>hm</think>x<|end|>"] and found.is_generation_prompt
    assert found.num_left_out == 1 and not found.num_history


@pytest.mark.parametrize("column", ["answer", "response", "output"])
@pytest.mark.parametrize("words", ["", " \n"])
def test_a_blank_answer_is_refused_by_the_name_that_the_row_has_for_it(column: str, words: str) -> None:
    assert refused({"question": "q", column: words}).found.startswith(f"{column} is ")
    record = {"inputs": {"question": "q"}, "outputs": {"answer": words}}
    assert refused(record).found.startswith("outputs.answer is ")
