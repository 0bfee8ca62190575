"""Chat rendering: spans lie where the words lie, for every kind of template, or the row is refused."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from strop.data.read.row import RowRefused
from strop.data.text.markers import THINK_TAG, Markers
from strop.data.text.render import Rendered, Renderer, TextRules
from strop.errors import ConfigError, ModelError
from strop.types import Example, Message, Origin

Make = Callable[..., PreTrainedTokenizerFast]
HERE = Origin("rows.jsonl", 1)
CALL = {"type": "function", "function": {"name": "search", "arguments": "{}"}}

THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|start|>' + m['role'] + '\n' + c + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CALLING = (
    "{% if tools %}{{ '<|start|>tools\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] %}{{ '<tool_call>' + (c['function'] | tojson) }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)


def turn(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more} if content is not None else {"role": role, **more}


def render(tokenizer: PreTrainedTokenizerFast, *messages: Message, tools: Any = None) -> Rendered:
    """The conversation, split before its first assistant turn."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    (rendered,) = Renderer(tokenizer).render(Example(messages[:first], (messages[first:],), HERE, tools))
    return rendered


def words(rendered: Rendered, spans: Any) -> list[str]:
    return [rendered.text[span[0] : span[1]] for span in spans]


# no character of the two private-use planes, which the marks come from, and no half surrogate pairs
text = st.text(st.characters(max_codepoint=0xEFFFF, exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda words: words.strip() and not THINK_TAG.search(words)
)


def test_a_tag_that_opens_nothing_is_the_answer(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(template=templates["chatml"])
    rendered = render(tokenizer, turn("user", "q"), turn("assistant", "<think>"))
    assert words(rendered, rendered.trained) == ["<think><|end|>"]
    assert words(rendered, rendered.contents) == ["q", "<think>"]


KINDS = ("chatml", "generation_blocks", "trimming", "mistral", "system_into_user", "no_end_token", "role_tokens")


@pytest.mark.parametrize("name", KINDS)
@given(contents=st.lists(text, min_size=4, max_size=4), system=st.none() | text)
@settings(max_examples=25, deadline=None)
def test_the_trained_spans_are_the_assistants_words(
    name: str, contents: list[str], system: str | None, make_tokenizer: Make, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(template=templates[name])
    roles = ("user", "assistant", "user", "assistant")
    messages = [turn(role, content) for role, content in zip(roles, contents, strict=True)]
    if system is not None and name != "no_end_token":
        messages = [turn("system", system), *messages]
    rendered = render(tokenizer, *messages)

    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    as_rendered = str.strip if name == "trimming" else str
    # marks stand inside of the white space at a content's ends
    assert sorted(words(rendered, rendered.contents)) == sorted(m["content"].strip() for m in messages)
    ends = {"mistral": "</s>", "system_into_user": " </s>", "no_end_token": "", "role_tokens": ""}
    # the space after the prompt is the model's to write
    lead = " " if name in ("mistral", "system_into_user", "no_end_token") else ""
    expected = [lead + as_rendered(contents[i]) + ends.get(name, "<|end|>") for i in (1, 3)]
    if name in ("no_end_token", "role_tokens"):
        # nothing closes an answer there, and what a template writes behind it is not the answer's
        assert [a.rstrip() for a in words(rendered, rendered.trained)] == [e.rstrip() for e in expected]
    else:
        assert words(rendered, rendered.trained) == expected
    assert rendered.is_generation_prompt and rendered.num_history == 0
    # the prompt is what inference sees
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    opening = tokenizer.apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True)
    assert rendered.text[: rendered.boundary] == opening
    assert all(start >= rendered.boundary for start, _ in rendered.trained)


def test_white_space_at_the_ends_of_contents(make_tokenizer: Make, templates: dict[str, str]) -> None:
    messages = (turn("user", "q"), turn("assistant", "  two words \n"))
    kept = render(make_tokenizer(template=templates["chatml"]), *messages)
    assert words(kept, kept.trained) == ["  two words \n<|end|>"]
    trimmed = render(make_tokenizer(template=templates["trimming"]), *messages)
    assert words(trimmed, trimmed.trained) == ["two words<|end|>"]


def test_an_empty_answer_has_a_place(make_tokenizer: Make) -> None:
    rendered = render(
        make_tokenizer(), turn("user", "q"), turn("assistant", ""), turn("user", "r"), turn("assistant", "y")
    )
    assert words(rendered, rendered.trained) == ["<|end|>", "y<|end|>"]


def test_a_template_that_drops_a_turn_is_refused_for_rows_that_have_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=NO_SYSTEM)
    render(tokenizer, turn("user", "q"), turn("assistant", "x"))
    with pytest.raises(RowRefused) as refusal:
        render(tokenizer, turn("system", "q"), turn("user", "q"), turn("assistant", "x"))
    assert refusal.value.reason == "dropped_by_template" and "system" in refusal.value.found


def test_earlier_turns_whose_reasoning_is_dropped_are_history(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    thoughts = "<think>hm</think>x"
    last = render(tokenizer, turn("user", "q"), turn("assistant", thoughts))
    assert words(last, last.trained) == [thoughts + "<|end|>"]
    # in front of another turn the thoughts go: inference would have written them
    messages = turn("user", "q"), turn("assistant", thoughts), turn("user", "r"), turn("assistant", "y")
    rendered = render(tokenizer, *messages)
    assert words(rendered, rendered.trained) == ["y<|end|>"] and rendered.num_history == 1
    assert rendered.num_prompt_turns == 3 and "hm" not in rendered.text
    assert rendered.text[: rendered.boundary] == tokenizer.apply_chat_template(
        list(messages[:3]), tokenize=False, add_generation_prompt=True
    )
    (context,) = Renderer(tokenizer).render(Example(messages[:3], (messages[3:],), HERE))
    assert words(context, context.trained) == ["y<|end|>"] and context.num_history == 0


def test_without_marks_a_control_token_in_a_content_is_refused(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + (m['content'] | length | string) + '</s>' }}"
    tokenizer = make_tokenizer(template=template + "{% endfor %}")
    rendered = render(tokenizer, turn("user", "q"), turn("assistant", "x"))
    assert words(rendered, rendered.trained) == ["assistant:x1</s>"] and rendered.contents == ()
    with pytest.raises(RowRefused) as refusal:
        render(tokenizer, turn("user", "</s>"), turn("assistant", "x"))
    assert refusal.value.reason == "spans_not_found" and "</s>" in refusal.value.found


def test_every_place_of_a_repeated_content_is_found(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '|' + m['content'] + '</s>' }}{% endfor %}"
    rendered = render(make_tokenizer(template=template), turn("user", "q"), turn("assistant", "x"))
    # a template that writes no generation prompt leaves the header to the model
    assert words(rendered, rendered.trained) == ["assistant:x|x</s>"]
    assert words(rendered, rendered.contents) == ["q", "q", "x", "x"]


def test_what_the_generation_prompt_writes_of_an_answer_is_prompt(
    make_tokenizer: Make, templates: dict[str, str]
) -> None:
    template = templates["chatml"].replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    tokenizer = make_tokenizer(template=template)
    rendered = render(tokenizer, turn("user", "q"), turn("assistant", "<think>hm</think>x"))
    assert rendered.text[: rendered.boundary].endswith("<|start|>assistant\n<think>")
    assert words(rendered, rendered.trained) == ["hm</think>x<|end|>"]


def test_tool_calls_are_trained_whole_and_never_dropped(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=CALLING)
    calling = turn("assistant", None, tool_calls=[CALL])
    rendered = render(tokenizer, turn("user", "q"), calling, turn("tool", "12"), turn("assistant", "x"))
    trained = words(rendered, rendered.trained)
    assert trained[0].startswith("<tool_call>") and "search" in trained[0] and trained[0].endswith("<|end|>")
    assert trained[1] == "x<|end|>"
    # a template without tools: a call in place of a content, a call beside one and a tool list would be left out
    cases: list[tuple[str, Message, Any]] = [
        ("dropped_by_template", calling, None),
        ("dropped_by_template", turn("assistant", "x", tool_calls=[CALL]), None),
        ("dropped_by_template", turn("assistant", "x"), ({"name": "search"},)),
    ]
    for reason, answer, tools in cases:
        with pytest.raises(RowRefused) as refusal:
            render(make_tokenizer(), turn("user", "q"), answer, tools=tools)
        assert refusal.value.reason == reason


def test_control_tokens_in_tool_calls_are_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=CALLING)
    call = {"function": {"name": "search", "arguments": {"q": ["a<|end|>b"]}}}
    tool = {"name": "search", "description": "</s>"}
    answer = turn("assistant", "x")
    for messages, tools in (((turn("assistant", "y", tool_calls=[call]),), None), ((answer,), (tool,))):
        with pytest.raises(RowRefused) as refusal:
            render(tokenizer, turn("user", "q"), *messages, tools=tools)
        assert refusal.value.reason == "control_token"


def test_added_tokens_of_the_template_are_the_assistants_alone(make_tokenizer: Make) -> None:
    """Where they are not special, they may stand in its calls, but in no tool and no name of another turn."""
    tokenizer = make_tokenizer(template=CALLING + "{# <tool_call> #}{{ '' if not messages[0].name else '' }}")
    call = {"function": {"name": "search", "arguments": {"q": ["a<tool_call>b"]}}}
    render(tokenizer, turn("user", "q"), turn("assistant", "y", tool_calls=[call]))
    answer, tool = turn("assistant", "x"), {"name": "search", "description": "a<tool_call>b"}
    for user, tools in ((turn("user", "q"), (tool,)), (turn("user", "q", name="<tool_call>"), None)):
        with pytest.raises(RowRefused) as refusal:
            render(tokenizer, user, answer, tools=tools)
        assert refusal.value.reason == "control_token"


def test_generation_blocks_decide(make_tokenizer: Make) -> None:
    """As transformers has it: what no block marks is not trained, be it a tool call."""
    template = CALLING.replace(
        "{{ '<|start|>' + m['role'] + '\n' + (m['content'] or '') }}",
        "{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and m['content'] %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] or '' }}{% endif %}",
    )
    calling = turn("assistant", None, tool_calls=[CALL])
    rendered = render(make_tokenizer(template=template), turn("user", "q"), calling, turn("assistant", "x"))
    assert words(rendered, rendered.trained) == ["x"]
    with pytest.raises(RowRefused) as refusal:
        render(make_tokenizer(template=template), turn("user", "q"), calling)
    assert refusal.value.reason == "nothing_trained"


def test_a_template_that_fails_refuses_the_row(make_tokenizer: Make) -> None:
    for template in ("{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[9]['content'] + 1 }}"):
        with pytest.raises(RowRefused) as refusal:
            render(make_tokenizer(template=template), turn("user", "q"), turn("assistant", "x"))
        assert refusal.value.reason == "template_error"


def test_a_broken_template_is_no_fault_of_the_row(make_tokenizer: Make) -> None:
    with pytest.raises(ModelError, match=r"chat template is broken.*\(line 2\)"):
        render(make_tokenizer(template="\n{{ oops( }}"), turn("user", "q"), turn("assistant", "x"))


def test_rows_that_hold_marks_themselves(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    for content in ("\U000f0000\U000f0001", "\U00100000x\U000f0003"):
        rendered = render(tokenizer, turn("user", content), turn("assistant", content))
        assert [w.removesuffix("<|end|>") for w in words(rendered, rendered.trained)] == [content]
    assert Markers.put((), "\U00100000\U000f0003") is None


def test_text_rows_are_wrapped_or_not(make_tokenizer: Make) -> None:
    example = Example("q", (" x", " y"), HERE)
    raw, _ = Renderer(make_tokenizer(), TextRules("raw")).render(example)
    assert (raw.text, raw.boundary, raw.trained, raw.starts_bare) == ("q x", 1, ((1, 3),), True)
    for mode in ("auto", "chat"):
        chat, _ = Renderer(make_tokenizer(), TextRules(mode)).render(example)  # type: ignore[arg-type]
        assert chat.text == "<|start|>user\nq<|end|>\n<|start|>assistant\n x<|end|>\n" and not chat.starts_bare
    bare = make_tokenizer(template=None)
    assert Renderer(bare).render(example)[0].text == "q x"
    assert Renderer(bare, TextRules("chat")).render(example)[0].text == "User: q\n\nAssistant:  x</s>\n\n"
    with pytest.raises(ConfigError, match="raw") as error:
        Renderer(make_tokenizer(), TextRules("raw")).render(
            Example((turn("user", "q"),), ((turn("assistant", "x"),),), HERE)
        )
    assert error.value.where == str(HERE)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_built_in_template_goes_for_tokenizers_without_one(make_tokenizer: Make, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(template=None, adds_bos=adds_bos)
    messages = (
        turn("system", "b"),
        turn("user", "q"),
        turn("assistant", "x"),
        turn("user", "r"),
        turn("assistant", "y"),
    )
    rendered = render(tokenizer, *messages)
    begin = "<s>" if adds_bos else ""
    assert rendered.text == f"{begin}b\n\nUser: q\n\nAssistant: x</s>\n\nUser: r\n\nAssistant: y</s>\n\n"
    assert words(rendered, rendered.trained) == [" x</s>", " y</s>"]
    tokenizer.chat_template = Renderer(tokenizer).template
    assert tokenizer.apply_chat_template(list(messages), tokenize=False) == rendered.text


def test_a_tokenizer_with_two_templates_uses_the_one_for_tools(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(template=None)
    tokenizer.chat_template = {"default": templates["chatml"], "tool_use": CALLING}
    with_tools = render(tokenizer, turn("user", "q"), turn("assistant", "x"), tools=({"name": "search"},))
    assert with_tools.text.startswith("<|start|>tools")
    assert not render(tokenizer, turn("user", "q"), turn("assistant", "x")).text.startswith("<|start|>tools")
    tokenizer.chat_template = {"tool_use": CALLING, "rag": templates["chatml"]}
    with pytest.raises(ModelError, match="tool_use, rag"):
        Renderer(tokenizer)


# what reasoning models' templates do: the generation prompt opens a thought, earlier turns lose theirs
OPENS_A_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|start|>' + m['role'] + '\n' + c + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
READS_REASONING = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if loop.index0 > last.user %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{% endif %}"
    "{{ (m['content'] or '') + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ENDS_WITH_THE_NEXT_HEADER = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_a_content_goes_on_where_the_generation_prompt_ends(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=OPENS_A_THOUGHT)
    for thought in ("hm", ""):
        rendered = render(tokenizer, turn("user", "q"), turn("assistant", f"<think>\n{thought}\n</think>\nx"))
        assert words(rendered, rendered.trained) == [f"{thought}\n</think>\nx<|end|>"]
        assert rendered.text[: rendered.boundary].endswith("<think>\n") and rendered.is_generation_prompt
    # elsewhere the content would not be what inference comes to
    with pytest.raises(RowRefused, match="reasoning of turn 2") as refusal:
        render(tokenizer, turn("user", "q"), turn("assistant", "<think>hm</think>x"))
    assert "<think>\\n" in refusal.value.expected


def test_a_prompt_that_inference_does_not_see_is_told(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=OPENS_A_THOUGHT)
    rendered = render(tokenizer, turn("user", "q"), turn("assistant", "x"), turn("user", "r"), turn("assistant", "y"))
    assert words(rendered, rendered.trained) == ["x<|end|>", "y<|end|>"] and not rendered.is_generation_prompt
    # where the last turn follows its generation prompt, the others are history
    last = turn("assistant", "<think>\nhm\n</think>y")
    rendered = render(tokenizer, turn("user", "q"), turn("assistant", "x"), turn("user", "r"), last)
    assert words(rendered, rendered.trained) == ["hm\n</think>y<|end|>"]
    assert rendered.is_generation_prompt and (rendered.num_history, rendered.num_prompt_turns) == (1, 3)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_any_key(
    key: str, make_tokenizer: Make, templates: dict[str, str]
) -> None:
    answer = turn("assistant", "x", **{key: "a </s> b"})
    tokenizer = make_tokenizer(template=READS_REASONING)
    rendered = render(tokenizer, turn("user", "q"), answer)
    assert words(rendered, rendered.trained) == ["<think>a </s> b</think>x<|end|>"]
    assert "a </s> b" in words(rendered, rendered.contents)  # so a control token in it is encoded as text
    # earlier turns lose it: they are history
    rendered = render(tokenizer, turn("user", "q"), answer, turn("user", "r"), turn("assistant", "y"))
    assert words(rendered, rendered.trained) == ["<think></think>y<|end|>"] and rendered.num_history == 1
    # a template without a place for it
    plain = make_tokenizer(template=templates["chatml"])
    with pytest.raises(RowRefused) as refusal:
        render(plain, turn("user", "q"), answer)
    assert refusal.value.reason == "dropped_by_template" and "on_dropped_reasoning" in refusal.value.fix
    example = Example((turn("user", "q"),), ((answer,),), HERE)
    (rendered,) = Renderer(plain, TextRules(on_dropped_reasoning="drop")).render(example)
    assert words(rendered, rendered.trained) == ["x<|end|>"] and rendered.num_dropped_reasoning == 1


def test_an_answer_ends_with_the_next_header_where_generation_stops_at_it(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=ENDS_WITH_THE_NEXT_HEADER)
    messages = turn("user", "q"), turn("assistant", "x"), turn("user", "r"), turn("assistant", "y")
    example = Example(messages[:1], (messages[1:],), HERE)
    (rendered,) = Renderer(tokenizer).render(example)
    assert words(rendered, rendered.trained) == ["x", "y"]  # the encoder closes the last one by the EOS token
    (rendered,) = Renderer(tokenizer, stop_tokens=[tokenizer.convert_tokens_to_ids("<|user|>")]).render(example)
    assert words(rendered, rendered.trained) == ["x<|user|>", "y<|user|>"]


def test_turns_that_the_row_or_the_configuration_leaves_out(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=CALLING)
    calling = turn("assistant", "c", tool_calls=[CALL])
    messages = (
        turn("user", "q"),
        turn("assistant", "x"),
        turn("user", "r"),
        calling,
        turn("tool", "1"),
        turn("assistant", "y"),
    )

    def trained(train_on: Any = "all", *, left_out: int | None = None) -> list[str]:
        rows = [{**m, "train": False} if i == left_out else m for i, m in enumerate(messages)]
        example = Example(tuple(rows[:1]), (tuple(rows[1:]),), HERE)
        (rendered,) = Renderer(tokenizer, TextRules(train_on=train_on)).render(example)
        assert "train" not in rendered.text.replace("<|", "")
        assert rendered.num_left_out == (left_out is not None)
        return [span[0] for span in words(rendered, rendered.trained)]

    assert trained() == ["x", "c", "y"]
    assert trained("last") == ["y"] and trained("last_and_tools") == ["c", "y"]
    assert trained(left_out=1) == ["c", "y"] and trained(left_out=5) == ["x", "c"]
    with pytest.raises(RowRefused) as refusal:
        trained("last", left_out=5)
    assert refusal.value.reason == "nothing_trained"


def test_arguments_reach_the_template_in_the_form_that_it_takes(make_tokenizer: Make) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    answer = turn("assistant", None, tool_calls=[call])
    heads = ("m['content'] or ''", "m['content'] if m['content'] is not none else ''")
    for arguments in ("f['arguments']", "f['arguments'] | string", "f['arguments'] | tojson"):
        for head in heads:
            template = (
                "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + ("
                + head
                + ") }}{% for c in m['tool_calls'] "
                "%}{% set f = c['function'] %}{{ f['name'] + ' ' + (" + arguments + ") }}{% endfor %}{{ '<|end|>' }}"
                "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
            )
            rendered = render(make_tokenizer(template=template), turn("user", "q"), answer)
            assert words(rendered, rendered.trained) == ['add {"a": 2}<|end|>'], (arguments, head)


def test_a_call_that_the_template_leaves_out_is_told(make_tokenizer: Make) -> None:
    only_the_first = CALLING.replace("{% for c in m['tool_calls'] %}", "{% for c in (m['tool_calls'] or [])[:1] %}")
    calls = [{"function": {"name": "search", "arguments": {"q": word}}} for word in ("x", "y")]
    with pytest.raises(RowRefused, match="leaves a call of 'search' in turn 2 out"):
        render(make_tokenizer(template=only_the_first), turn("user", "q"), turn("assistant", None, tool_calls=calls))


@pytest.mark.parametrize("described", [True, False])
def test_tools_that_the_template_leaves_out_are_told_though_their_names_are_in_calls(
    described: bool, make_tokenizer: Make
) -> None:
    function = {"name": "search", "parameters": {}, **({"description": 'Looks "it" up.'} if described else {})}
    calls = [{"function": {"name": "search", "arguments": {"q": "x"}}}]
    messages = turn("user", "q"), turn("assistant", None, tool_calls=calls)
    example = Example(messages[:1], (messages[1:],), HERE, ({"type": "function", "function": function},))
    with pytest.raises(RowRefused, match="leaves the tools of the row out"):
        Renderer(make_tokenizer(template=CALLING.replace("{% if tools %}", "{% if tools and false %}"))).render(example)
    (rendered,) = Renderer(make_tokenizer(template=CALLING)).render(example)
    assert words(rendered, rendered.trained)


def test_no_token_lies_across_a_later_generation_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(template=READS_REASONING.replace("'<think>' +", "'<think>\n' +"))
    renderer = Renderer(tokenizer)
    messages = turn("user", "q"), turn("assistant", "x"), turn("tool", "t"), turn("assistant", "y")
    (rendered,) = renderer.render(Example(messages[:1], (messages[1:],), HERE))
    assert [rendered.text[:at][-10:] for at in rendered.openings] == ["assistant\n"] * 2


def test_a_template_sees_the_date_that_it_is_given(make_tokenizer: Make) -> None:
    template = "{{ strftime_now('%d %B %Y') }}" + READS_REASONING
    tokenizer = make_tokenizer(template=template)
    rules = TextRules(date=datetime.date(2024, 2, 29))
    for answer in (turn("assistant", "x"), turn("assistant", "x", reasoning_content="hm")):
        example = Example((turn("user", "q"),), ((answer,),), HERE)
        assert Renderer(tokenizer, rules).render(example)[0].text.startswith("29 February 2024<")
        (today,) = Renderer(tokenizer).render(example)
        assert str(datetime.date.today().year) in today.text


def test_contents_reach_templates_that_want_parts(make_tokenizer: Make) -> None:
    template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    rendered = render(make_tokenizer(template=template), turn("user", "a </s> b"), turn("assistant", "x"))
    assert words(rendered, rendered.trained) == ["x<|end|>"]
    assert words(rendered, rendered.contents) == ["a </s> b", "x"]


def test_contents_in_parts_are_never_written_as_python_has_them(make_tokenizer: Make) -> None:
    """A template that drops something of a text writes all of it where the content is a list that it prints."""
    template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% set c = m['content'] %}"
        "{% if c is string and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{ c | WRITE }}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think></think>' }}{% endif %}"
    )
    for write in ("string", "tojson"):
        tokenizer = make_tokenizer(template=template.replace("WRITE", write))
        with pytest.raises(RowRefused, match="leaves the reasoning of turn 2 out"):
            render(tokenizer, turn("user", "q"), turn("assistant", "<think>hm</think>x"))
