"""Shipped templates write what the models' published ones write, and train answers with their end tokens alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from strop.data.load import load_data
from strop.data.read.row import RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.data.text.chat_template import choose_template, shipped_templates
from strop.data.text.encode import Encoder
from strop.data.text.render import Renderer, TextRules
from strop.errors import ConfigError
from strop.types import Origin

Make = Callable[..., Any]
SPECIALS = [
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
    "<end_of_turn>",
]  # fmt: skip

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + "
    "message['content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + "
    "eos_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
MISTRAL = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim -}}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
WORDS = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATML = QWEN.replace(f"<|im_start|>system\\n{WORDS}<|im_end|>\\n", "").replace(WORDS, "")
"""Qwen's without its own system text, and without a turn that would hold nothing else."""
PUBLISHED = {
    "llama3_instruct": LLAMA3,
    "qwen2.5_instruct": QWEN,
    "chatml": CHATML,
    "olmo2_instruct": OLMO2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
}
NAMES = [*PUBLISHED, "plain"]


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def s(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


CONVERSATIONS = {
    "one turn": [u("What is it?"), a("A dog.")],
    "several turns": [u("q"), a("x y z"), u("again?"), a("no"), u("and now"), a("yes.\n\nreally")],
    "system": [s("Be brief."), u("What is it?"), a("A dog.")],
    "several turns with system": [s("Be brief."), u("q"), a("x"), u("r"), a("y")],
    "unicode": [u("\u00e9\u4e16\u754c \U0001f600 e\u0301 \u05d0\u202e"), a("\U0001f44d\u200d\u2028 \u00df")],
    "white space": [u("a\n\n b\t"), a("x  y\n z")],
    "control tokens as words": [u("a</s>b <|im_end|> <|eot_id|>[INST]"), a("<end_of_turn> x </s> y")],
    "template code as words": [u("{{ 7 * 7 }} {% raw %}"), a("{# x #} \\n '\"")],
}


@pytest.fixture(scope="session")
def tokenizers(make_tokenizer: Make, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Tokenizers that know the templates' control tokens, and real ones that know some of them at most."""
    found = {}
    for kind in ("byte_level", "sentence_piece"):
        tokenizer = make_tokenizer(kind, None)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(text, special=True, normalized=False) for text in SPECIALS]}
        )
        found[kind] = tokenizer
    folder = Path(__file__).resolve().parents[3] / ".." / "shared" / "tokenizers"
    for path in sorted(folder.glob("*/tokenizer.json")):
        found[path.parent.name] = AutoTokenizer.from_pretrained(path.parent)
    return found


def trained_words(tokenizer: Any, encoded: Any) -> str:
    (side,) = encoded.sides
    return str(tokenizer.decode([t for t, m in zip(side.ids, side.mask, strict=True) if m]))


@pytest.mark.nightly
def test_b8_chatml_says_nothing_that_no_row_said(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte_level"]
    source = choose_template("chatml", tokenizer).source
    text = tokenizer.apply_chat_template([u("q"), a("x")], chat_template=source, tokenize=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"


def test_b8_all_are_there() -> None:
    assert shipped_templates() == sorted(NAMES)


@pytest.mark.share(1)
@pytest.mark.parametrize("name", PUBLISHED)
def test_b8_the_same_text_as_the_published_template(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte_level"]
    source = choose_template(name, tokenizer).source
    for label, turns in CONVERSATIONS.items():
        cases = [(turns, False), (turns[:-1], True)]
        if name == "mistral" and turns[0]["role"] == "system":
            del cases[0]  # the published one drops the system text in front of an answer
        for messages, prompt in cases:
            ours, theirs = (
                tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
                )
                for template in (source, PUBLISHED[name])
            )
            assert ours == theirs, (label, prompt)


@pytest.mark.parametrize("name", ["qwen2.5_instruct", "chatml"])
def test_b8_tools_as_the_published_template_writes_them(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte_level"]
    calls = [{"type": "function", "function": {"name": n, "arguments": {"q": "\u00e9", "n": [1, None]}}} for n in "fg"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}] * 2
    tool = {"role": "tool", "content": "12"}
    turns = [u("q"), {"role": "assistant", "content": "", "tool_calls": calls}, tool, tool, a("x")]
    more = [u("q"), {"role": "assistant", "content": "Wait.", "tool_calls": calls[:1]}, tool, a("x")]
    source = choose_template(name, tokenizer).source
    for messages in (turns, more, [s("b"), *turns], turns[:3]):
        for given in (tools, None):
            ours, theirs = (
                tokenizer.apply_chat_template(messages, tools=given, chat_template=template, tokenize=False)
                for template in (source, PUBLISHED[name])
            )
            assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_b8_ids_are_those_of_the_exported_template_and_the_mask_is_the_answer(
    name: str, tokenizers: dict[str, Any]
) -> None:
    for kind, tokenizer in tokenizers.items():
        renderer = Renderer(tokenizer, TextRules(template=name))
        encoder = Encoder(tokenizer, renderer.template)
        tokenizer.chat_template = renderer.template  # the export
        for label, turns in CONVERSATIONS.items():
            where = (name, kind, label)
            example = to_example({"messages": turns}, Origin("x", 1), "single", RowColumns())
            (encoded,) = encoder.encode([renderer.render(example)])
            assert not isinstance(encoded, RowRefused), (where, encoded)
            ids = [*encoded.prompt_ids, *encoded.sides[0].ids]
            answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            if label != "control tokens as words":  # which apply_chat_template takes for control tokens
                theirs = tokenizer.apply_chat_template(turns, return_dict=False)
                if encoded.counts["boundaries_split"]:
                    # the toy tokenizer joins the end of the prompt and the answer: inference never does
                    assert kind == "byte_level" and tokenizer.decode(theirs).startswith(tokenizer.decode(ids)), where
                    continue
                if theirs[: len(ids)] == ids:
                    assert not tokenizer.decode(theirs[len(ids) :]).strip(), where
                else:  # GPT-2's rule splits line ends before a word, so the prompt alone, as inference sees it, differs
                    assert name == "llama3_instruct" and kind in ("byte_level", "gpt2"), where
                    assert tokenizer.decode(theirs).startswith(tokenizer.decode(ids)), where
                stable = name != "mistral" or label != "several turns with system"
                if stable:  # there the system text moves on with the last user turn
                    first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
                    prompt = tokenizer.apply_chat_template(turns[:first], add_generation_prompt=True, return_dict=False)
                    assert prompt == encoded.prompt_ids, where
            else:
                assert sum(ids.count(i) for i in tokenizer.all_special_ids) <= 12, where
            end = tokenizer.apply_chat_template([u("q"), a("@@")], tokenize=False).rpartition("@@")[2].strip()
            got = "".join(trained_words(tokenizer, encoded).split())
            want = "".join("".join(answer.split()) + "".join(end.split()) for answer in answers)
            assert got == want, where


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["gpt2", "mistral-tekken-131k", "mistral-v3-32k"])
def test_b8_rows_with_tools_have_the_ids_of_the_exported_template(kind: str, shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / kind)
    renderer = Renderer(tokenizer, TextRules(template="qwen2.5_instruct"))
    encoder = Encoder(tokenizer, renderer.template)
    tokenizer.chat_template = renderer.template
    num_calls = 0
    for line in (shared / "data" / "sft_toolcalls.train.jsonl").read_text(encoding="utf-8").splitlines()[:60]:
        example = to_example(json.loads(line), Origin("x", 1), "single", RowColumns())
        (encoded,) = encoder.encode([renderer.render(example)])
        assert not isinstance(encoded, RowRefused), encoded
        turns, tools = [*example.prompt, *example.completions[0]], list(example.tools or ()) or None
        theirs = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
        ids = [*encoded.prompt_ids, *encoded.sides[0].ids]
        assert theirs[: len(ids)] == ids and not tokenizer.decode(theirs[len(ids) :]).strip()
        trained = trained_words(tokenizer, encoded)
        for turn in turns:
            words = turn.get("content") or ""
            assert ("".join(words.split()) in "".join(trained.split())) or turn["role"] != "assistant"
            for call in turn.get("tool_calls", ()):
                num_calls += 1
                assert f'"name": "{call["function"]["name"]}"' in trained
    assert num_calls > 20


@pytest.mark.parametrize("name", NAMES)
def test_b8_prompts_and_earlier_turns_are_prefixes(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["byte_level"]
    source = choose_template(name, tokenizer).source

    def text(messages: list[Any], prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(messages, chat_template=source, add_generation_prompt=prompt, tokenize=False)
        )

    for label, turns in CONVERSATIONS.items():
        whole = text(turns)
        for stop in range(1, len(turns)):
            if name == "mistral" and turns[0]["role"] == "system" and stop < len(turns) - 1:
                continue
            if turns[stop]["role"] == "assistant":
                assert whole.startswith(text(turns[:stop], prompt=True)), label
            elif turns[stop - 1]["role"] == "assistant":
                assert whole.startswith(text(turns[:stop])), label


@pytest.mark.parametrize("name", NAMES)
def test_b8_what_a_template_has_no_place_for_is_refused(name: str, tokenizers: dict[str, Any]) -> None:
    renderer = Renderer(tokenizers["byte_level"], TextRules(template=name))

    def reason(*turns: dict[str, Any], **more: Any) -> str | None:
        try:
            renderer.render(to_example({"messages": list(turns), **more}, Origin("x", 1), "single", RowColumns()))
        except RowRefused as refusal:
            return refusal.reason
        return None

    merges = name in ("mistral", "gemma")
    assert reason(s("b"), a("x")) == ("dropped_by_template" if merges else None)
    assert reason(s(""), u("q"), a("x")) is None
    assert reason(a("x")) is None
    knows_tools = name in ("qwen2.5_instruct", "chatml")
    assert reason(u("q"), a("x"), tools=[{"name": "f"}]) == (None if knows_tools else "dropped_by_template")
    tool = {"role": "tool", "content": "12"}
    assert reason(u("q"), a("x"), tool, a("y")) == (None if knows_tools or name == "plain" else "template_error")


def test_b8_an_end_that_is_no_token_is_closed_by_eos(tokenizers: dict[str, Any], make_tokenizer: Make) -> None:
    knows, does_not = tokenizers["byte_level"], make_tokenizer()
    for tokenizer, end in ((knows, "<|eot_id|>"), (does_not, "<|eot_id|></s>")):
        source = choose_template("llama3_instruct", tokenizer).source
        text = tokenizer.apply_chat_template([u("q"), a("x")], chat_template=source, tokenize=False)
        assert text.endswith("x" + end)


def test_b8_templates_of_ones_own(tmp_path: Path, make_config: Make, make_tokenizer: Make) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "x"}\n')
    own, jinja = tmp_path / "own.yaml", tmp_path / "own.jinja"
    own.write_text('user: {begin: "Q: ", end: "\\n"}\nassistant: {begin: "A: ", end: "{{ eos_token }}"}\n')
    jinja.write_text("{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + eos_token }}{% endfor %}")
    tokenizer = make_tokenizer()
    for path, text in ((own, "Q: q\nA: x</s>"), (jinja, "u: q</s>a: x</s>")):
        config = make_config(train_file=str(rows), template=str(path), validation_split=0.0)
        data = load_data(config, tokenizer, "single")
        group = data.train[0]
        assert tokenizer.decode([*group.prompt_ids, *group.completions[0].ids]) == text
        assert data.report.rendering.template == str(path) and data.chat_template is not None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.yaml", "user: {begin: a}\n", "assistant"),
        ("x.yaml", "user: {begin: a}\nassistant: {begin: b, end: c, stop: d}\n", "stop"),
        ("x.yaml", "user: {begin: a}\nassistant: {begin: b, end: c}\nsystem_mode: default\n", "default_system"),
        ("x.yaml", "user: {begin: 3}\nassistant: {begin: b, end: c}\n", "user.begin"),
        ("x.yaml", "- a\n", "list"),
        ("x.jinja", "{% for m in messages %}", "broken"),
        ("x.jinja", "\udcff", "broken"),
    ],
)
def test_b8_broken_templates_are_one_clear_error(
    name: str, content: str, message: str, tmp_path: Path, make_tokenizer: Make
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as error:
        choose_template(str(path), make_tokenizer())
    assert message in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ConfigError, match="llama3_instruct"):
        choose_template("llama4", make_tokenizer())
