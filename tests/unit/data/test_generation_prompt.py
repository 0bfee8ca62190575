"""Templates that leave things of earlier turns out once an answer follows: the answer stands behind the generation
prompt that inference sees, where that is provably the same text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rows import HERE, Row, a, s, u
from strop.data.read.row import RowRefused
from strop.data.text.render import Rendered, Renderer
from strop.types import Example

SYSTEM_AT_THE_END = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""The system text stands in the last user turn, if nothing follows it."""

THOUGHTS_WHILE_UNANSWERED = (
    "{% set done = messages[-1]['role'] == 'assistant' and not messages[-1].tool_calls %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning and (loop.last or not done) %}{{ '{' + m.reasoning + '}' }}{% endif %}{{ m['content'] or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""The reasoning in front of a call stands there until the answer comes."""

OPEN_THOUGHT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '</s>' }}{% else %}{{ '<|user|>' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


@pytest.fixture
def render(make_tokenizer: Callable[..., Any]) -> Callable[..., tuple[Rendered, ...]]:
    def rendered(template: str, prompt: list[Row], *answers: list[Row]) -> tuple[Rendered, ...]:
        return Renderer(make_tokenizer(template=template)).render(
            Example(tuple(prompt), tuple(map(tuple, answers)), HERE)
        )

    return rendered


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.trained]


def test_a_system_text_that_an_answer_drives_out_stands_in_the_prompt(render: Callable[..., Any]) -> None:
    for prompt in ([s("b"), u("q")], [s("q"), u("q")]):
        (one, two) = render(SYSTEM_AT_THE_END, prompt, [a("x")], [a("q")])
        for side, answer in ((one, "x</s>"), (two, "q</s>")):
            assert side.text[: side.boundary] == f"<s>[INST]{prompt[0]['content']}\n\nq[/INST]"
            assert trained(side) == [answer] and side.is_generation_prompt and not side.left_out


def test_what_earlier_answers_have_not_seen_makes_them_history(render: Callable[..., Any]) -> None:
    (found,) = render(SYSTEM_AT_THE_END, [s("b"), u("q")], [a("x"), u("r"), a("y")])
    assert found.text == "<s>[INST]q[/INST]x</s>[INST]b\n\nr[/INST]y</s>"
    assert trained(found) == ["y</s>"] and found.num_history == 1
    (found,) = render(SYSTEM_AT_THE_END, [u("q")], [a("x"), u("r"), a("y")])
    assert trained(found) == ["x</s>", "y</s>"] and found.num_history == 0


def test_reasoning_before_a_call_is_trained_and_seen_by_the_answer(render: Callable[..., Any]) -> None:
    call = a("", reasoning="hm", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    result = {"role": "tool", "content": "r"}
    (found,) = render(THOUGHTS_WHILE_UNANSWERED, [u("q")], [call, result, a("x", reasoning="so")])
    assert trained(found) == ['{hm}{"name": "f", "arguments": {}}<|end|>', "{so}x<|end|>"]
    assert found.is_generation_prompt and not found.left_out and found.num_history == 0
    (one, two) = render(THOUGHTS_WHILE_UNANSWERED, [u("q"), call, result], [a("x", reasoning="so")], [a("y")])
    assert one.text[: one.boundary] == two.text[: two.boundary] and "{hm}" in one.text[: one.boundary]
    assert (trained(one), trained(two)) == (["{so}x<|end|>"], ["y<|end|>"])


@pytest.mark.parametrize(
    "template",
    [
        SYSTEM_AT_THE_END.replace("'[/INST]' }}{% else", "'[/SYS]' }}{% else"),  # the prompt ends otherwise
        SYSTEM_AT_THE_END.replace("m['content'] + '[/INST]' }}{% else", "'[/INST]' }}{% else"),  # without the question
        "{% generation %}{% endgeneration %}" + SYSTEM_AT_THE_END,
    ],
)
def test_what_is_not_provably_the_same_text_is_refused(template: str, render: Callable[..., Any]) -> None:
    with pytest.raises(RowRefused, match=r"leaves turn 1 \(system\) out"):
        render(template, [s("b"), u("q")], [a("x")])


@pytest.mark.parametrize("content", ["so\n</think>\n\nx", "<think>\nso\n</think>\n\nx"])
def test_a_content_that_begins_inside_of_its_thoughts(content: str, render: Callable[..., Any]) -> None:
    (found,) = render(OPEN_THOUGHT, [u("q")], [a(content)])
    assert found.text[: found.boundary] == "<|user|>q<|assistant|><think>\n"
    assert trained(found) == ["so\n</think>\n\nx</s>"]
    with pytest.raises(RowRefused, match="leaves the reasoning"):
        render(OPEN_THOUGHT, [u("q")], [a("<think>so</think>x")])  # another line end than the prompt has


@pytest.mark.parametrize(
    "tags", [("<think>", "<tool_call>"), ("<|channel>", "<|tool_call>"), ("[THINK]", "[TOOL_CALLS]")]
)
def test_a_prompt_never_ends_inside_of_a_tag(tags: tuple[str, str], render: Callable[..., Any]) -> None:
    """A generation prompt opens one tag where the rendering has another that begins alike."""
    thought, calling = tags
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] or '') }}{% for c in m.tool_calls or [] %}"
        f"{{{{ '{calling}' + (c.function | tojson) }}}}{{% endfor %}}{{{{ '</s>' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '<|assistant|>{thought}' }}}}{{% endif %}}"
    )
    call = a("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    result = {"role": "tool", "content": "r <t"}
    (found,) = render(template, [u("q <t")], [call, result, a("x")])
    assert found.text[: found.boundary] == "<|user|>q <t</s><|assistant|>" and not found.is_generation_prompt
    assert trained(found) == [calling + '{"name": "f", "arguments": {}}</s>', "x</s>"]


CLOSED_THOUGHT = OPEN_THOUGHT.replace("'<|assistant|>' +", "'<|assistant|><think></think>' +").replace(
    "'<|assistant|><think>\n'", "'<|assistant|><think></think>'"
)
"""Every answer has an empty thought in front, which the generation prompt writes."""


def test_no_thoughts_are_put_behind_a_prompt_that_has_closed_them(render: Callable[..., Any]) -> None:
    with pytest.raises(RowRefused, match="leaves the reasoning of turn 2 out"):
        render(CLOSED_THOUGHT, [u("q")], [a("<think>so</think>x")])
    for content in ("x", "<think>\n</think>x"):
        (found,) = render(CLOSED_THOUGHT, [u("q")], [a(content)])
        assert found.text[: found.boundary] == "<|user|>q<|assistant|><think></think>" and trained(found) == ["x</s>"]


def test_earlier_answers_that_a_template_never_writes_with_their_thoughts_are_history(
    render: Callable[..., Any],
) -> None:
    template = OPEN_THOUGHT.replace("<think>\n", "")
    (found,) = render(template, [u("q")], [a("<think>so</think>x"), u("r"), a("<think>no</think>y")])
    assert found.text == "<|user|>q<|assistant|>x</s><|user|>r<|assistant|><think>no</think>y</s>"
    assert trained(found) == ["<think>no</think>y</s>"] and found.num_history == 1
    assert "the reasoning of turn 2" in found.left_out


def test_a_last_answer_that_the_one_before_goes_on_into_is_refused(render: Callable[..., Any]) -> None:
    """Of a template that writes two answers in a row as one turn: the first would get an end token of its own."""
    merging = (
        "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '<|user|>' + m['content'] }}{% else %}"
        "{% if not loop.first and loop.previtem['role'] != 'assistant' %}{{ '<|assistant|>' }}{% endif %}"
        "{{ m['content'] }}{% if loop.last or loop.nextitem['role'] != 'assistant' %}{{ '</s>' }}{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(RowRefused, match="turn 3 does not follow its generation prompt"):
        render(merging, [u("q")], [a("x"), a("y")])
    (found,) = render(merging, [u("q")], [a("x"), u("r"), a("y")])
    assert trained(found) == ["x</s>", "y</s>"]


def test_a_conversation_that_begins_with_an_answer_trains_those_behind_it(render: Callable[..., Any]) -> None:
    (found,) = render(OPEN_THOUGHT, [], [a("x"), u("q"), a("y")])
    assert trained(found) == ["x</s>", "y</s>"]
