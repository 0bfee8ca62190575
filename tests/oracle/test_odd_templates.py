"""Templates of our own making, odd in ways that people's templates are: what is trained is what transformers says.

The oracle is the same as for the families: renderings by transformers, and its own mask where there are generation
blocks. Those of the second table are odd in a way that strop has to refuse or to count.
"""

from __future__ import annotations

from typing import Any

import pytest

from oracle.cells import judge, trained_by_strop
from oracle.conversations import CONVERSATIONS
from oracle.families import CHATML, Ends, Family, names

pytestmark = pytest.mark.skipif(not names(), reason="the package trl, whose templates are the measure, is not there")

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPEN = "{{ '<|im_start|>' + m.role + '\n' }}"
SAY = "{{ (m.content or '') }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CLOSE = "{{ '<|im_end|>\n' }}"


def each(words: str, ask: str = ASK, before: str = "") -> str:
    """A template that writes each message by `words`."""
    return before + "{% for m in messages %}" + words + "{% endfor %}" + ask


def by_role(assistant: str, other: str) -> str:
    return "{% if m.role == 'assistant' %}" + assistant + "{% else %}" + other + "{% endif %}"


END_OF_TEXT = Ends("</s>", "<s>")
TEMPLATES: dict[str, tuple[str, Ends]] = {
    "plain": (each(OPEN + SAY + CALLS + CLOSE, before=TOOLS), CHATML),
    "trims contents": (each(OPEN + "{{ (m.content or '') | trim }}" + CALLS + CLOSE, before=TOOLS), CHATML),
    "an end token behind the last turn alone": (
        each(
            "{{ '<|' + m.role + '|>' + (m.content or '') + '\n' }}"
            "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}",
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ),
        END_OF_TEXT,
    ),
    "words for headers": (
        each(
            by_role("{{ 'ASSISTANT: ' + m.content + eos_token }}", "{{ m.role | upper + ': ' + m.content + ' ' }}"),
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
            "{{ bos_token }}",
        ),
        END_OF_TEXT,
    ),
    "a think block in every turn": (
        each(
            OPEN + by_role("<think>{{ m.reasoning_content or '' }}</think>", "") + SAY + CLOSE,
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}",
        ),
        CHATML,
    ),
    "another header to be asked by": (each("{{ '<|im_start|>' + m.role + ':' }}" + SAY + CLOSE), CHATML),
    "a footer": (
        each(OPEN + SAY + CLOSE, ASK + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"),
        CHATML,
    ),
    "two end tokens": (each(OPEN + SAY + "{{ '<|eot|><|im_end|>\n' }}"), CHATML),
    "the length in the header": (
        each("{{ '<|im_start|>' + m.role + ' ' + (m.content or '') | length | string + '\n' }}" + SAY + CLOSE),
        CHATML,
    ),
    "reasoning that is trimmed": (
        each(
            OPEN
            + "{% if m.reasoning %}{{ '<think>\n' + m.reasoning.strip() + '\n</think>\n' }}{% endif %}"
            + "{{ (m.content or '').strip() }}"
            + CLOSE
        ),
        CHATML,
    ),
    "an effort at the last question": (
        each(
            OPEN + SAY + "{% if m.role == 'user' and loop.index0 == found.at %}{{ '\n/no_think' }}{% endif %}" + CLOSE,
            before="{% set found = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
            "{% set found.at = loop.index0 %}{% endif %}{% endfor %}",
        ),
        CHATML,
    ),
    "blocks": (
        each(OPEN + by_role("{% generation %}" + SAY + CALLS + CLOSE + "{% endgeneration %}", SAY + CLOSE)),
        CHATML,
    ),
    "blocks without the end token": (
        each(OPEN + by_role("{% generation %}" + SAY + "{% endgeneration %}", SAY) + CLOSE),
        CHATML,
    ),
    "blocks around a part of the answer": (
        each(
            OPEN
            + by_role("{% generation %}{{ (m.content or '')[:5] }}{% endgeneration %}{{ (m.content or '')[5:] }}", SAY)
            + CLOSE
        ),
        CHATML,
    ),
    "a block around the last answer": (
        each(
            OPEN
            + "{% if m.role == 'assistant' and loop.last %}{% generation %}"
            + SAY
            + "{{ '<|im_end|>' }}{% endgeneration %}{% else %}"
            + SAY
            + "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}"
        ),
        CHATML,
    ),
    "blocks around headers": (
        each(by_role("{% generation %}" + OPEN + SAY + CLOSE + "{% endgeneration %}", OPEN + SAY + CLOSE)),
        CHATML,
    ),
}


def family(name: str) -> Family:
    template, ends = TEMPLATES[name]
    return Family("odd", template, None, ends)


@pytest.fixture(autouse=True)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of a family is made of its template, by the family's name."""
    name = getattr(request.node, "callspec", None)
    if name is not None and "name" in name.params:
        from oracle import families

        families._tokenizer.cache_clear()
        monkeypatch.setattr(families, "family", lambda _: family(name.params["name"]))


@pytest.mark.share(3)
@pytest.mark.parametrize("name", tuple(TEMPLATES))
def test_what_is_trained_is_what_transformers_says(name: str) -> None:
    wrong = {}
    for kind, row in CONVERSATIONS.items():
        cell = judge(family(name), row, twin=False)
        if cell.kind == "WRONG":
            wrong[kind] = cell.words
    assert not wrong


TEMPLATES_WITH_A_FAULT = {
    "blocks around everybody": each("{% generation %}" + OPEN + SAY + CLOSE + "{% endgeneration %}"),
    "one block around all": "{% generation %}" + each(OPEN + SAY + CLOSE, "") + "{% endgeneration %}" + ASK,
}
TEMPLATES |= {name: (template, CHATML) for name, template in TEMPLATES_WITH_A_FAULT.items()}


@pytest.mark.parametrize("name", TEMPLATES_WITH_A_FAULT)
@pytest.mark.parametrize("kind", ["several_turns", "several_turns_with_system", "unicode", "one_turn"])
def test_blocks_never_make_the_words_of_others_trained(name: str, kind: str) -> None:
    row: dict[str, Any] = CONVERSATIONS[kind]
    found = trained_by_strop(family(name), TEMPLATES[name][0], row)
    if isinstance(found, str):
        assert found.startswith("spans_not_found") and "no assistant turn says" in found
        return
    said = family(name).tokenizer().decode([i for run in found.runs for i in run])
    assert not any(m["content"] in said for m in row["messages"] if m["role"] != "assistant")
