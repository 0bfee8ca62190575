"""A chat template from somewhere may loop for ever or fill the memory: it is stopped, whatever it does."""

from __future__ import annotations

import datetime
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from strop.data.read.row import RowRefused
from strop.data.text import sandbox
from strop.data.text.render import Renderer, TextRules
from strop.errors import ModelError
from strop.types import Example, Origin

Make = Callable[..., Any]
EXAMPLE = Example("q", ("x",), Origin("rows.jsonl", 7))
MESSAGES = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
POWERS = "{{ 7 ** (9 ** 9 + messages | length) }}"
FILLS = "{{ 'x' * (10 ** 12 * messages | length) }}"
WRAPS = "{{ ('a ' * 3000000) | wordwrap(1) }}"
FOLDED = "{{ 9 ** (9 ** 9) }}"
CAUGHT = "{{ (('a-' * 200000) | wordwrap(1) | urlize) }}"
DOUBLES = (
    "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    + "{{ n.s | length }}"
)

unix = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer here")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")


@unix
@pytest.mark.parametrize("template", [LOOPS, POWERS, FOLDED, WRAPS, CAUGHT])
def test_a_template_that_takes_for_ever_is_stopped(
    template: str, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    before = signal.getsignal(signal.SIGVTALRM)
    started = time.process_time()
    with pytest.raises(ModelError, match=r"rows\.jsonl:7: the chat template takes more than 0\.3 seconds"):
        Renderer(make_tokenizer(template=template + MESSAGES), TextRules("chat")).render(EXAMPLE)
    assert time.process_time() - started < 10
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@unix
@pytest.mark.parametrize("by_row", [False, True])
def test_looking_for_the_variables_of_a_template_is_stopped(
    by_row: bool, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    kwargs = {"enable_thinking": True}
    renderer = Renderer(
        make_tokenizer(template=FOLDED + MESSAGES), TextRules("chat", chat_template_kwargs={} if by_row else kwargs)
    )
    with pytest.raises(ModelError, match=r"the chat template takes more than 0\.3 seconds"):
        if by_row:
            renderer.render(replace(EXAMPLE, template_kwargs=kwargs))
        else:
            renderer.unread_kwargs()


@linux
@pytest.mark.parametrize("template", [FILLS, DOUBLES, "{{ 'x' * 10 ** 12 }}"])
def test_a_template_that_fills_the_memory_is_stopped(
    template: str, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(sandbox, "BYTES", 1 << 28)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ModelError, match=r"more than \d+ GiB of memory"), sandbox.bounded_memory():
        Renderer(make_tokenizer(template=template + MESSAGES), TextRules("chat")).render(EXAMPLE)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "words", ["''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os.getcwd()", "open('x').read()"]
)
def test_templates_cannot_reach_the_machine(words: str, make_tokenizer: Make) -> None:
    with pytest.raises(RowRefused, match="template_error"):
        Renderer(make_tokenizer(template="{{ " + words + " }}" + MESSAGES), TextRules("chat")).render(EXAMPLE)


READS = {
    "keys": "{{ m.role }}{{ m.content }}{{ m.absent }}{{ m.absent is defined }}{{ m.tool_calls is none }}",
    "methods of a dictionary": "{{ m.items() | list }}{{ m.get('role') }}{{ m.keys() | list }}{{ m.update({'a': 1}) }}",
    "a key like a method": "{{ m.items is mapping }}{{ m.pop is defined }}{{ m.copy().copy is string }}",
    "texts": "{{ m.content.strip().split('a') }}{{ m.role.startswith('u') }}{{ m.role.absent is defined }}",
    "formats": "{{ '{0.__class__}'.format(m) }}{{ '{a}'.format_map(m) }}",
    "insides": "{{ m.__class__ }}{{ m.role.__class__ }}{{ n.__class__ }}{{ n._Namespace__attrs }}{{ loop.__init__ }}",
    "namespaces": "{% set n.a = m.role %}{{ n.a }}{{ n.b }}{{ n.t }}{{ n.f() }}{{ n.none is none }}",
    "loops": "{{ loop.first }}{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem.role }}{{ loop.index0 }}{{ loop.no }}",
    "lists": "{{ l.append(1) }}{{ l.index(2) }}{{ l.absent is defined }}",
}


@pytest.mark.parametrize("reads", READS)
def test_what_a_template_reads_is_what_the_sandbox_lets_it_read(reads: str) -> None:
    """The shorter way to attributes gives what Jinja's own gives, and refuses what it refuses."""
    template = (
        "{% set n = namespace(t=1, f=m0.get, none=none) %}{% for m in messages %}" + READS[reads] + "{% endfor %}"
    )
    message = {"role": "user", "content": " abc ", "items": {"a": 1}, "copy": "x", "a": 2, "tool_calls": None}
    given = {"messages": [message, {**message, "role": "assistant"}], "l": [1, 2], "m0": message}
    environment = sandbox._compile_jinja_template.__wrapped__(template).environment
    quick = sandbox._quick(environment.getattr)

    def rendered() -> str:
        try:
            return str(environment.from_string(template).render(given))
        except sandbox.TEMPLATE_ERRORS as error:
            return repr(error)

    expected = rendered()
    environment.getattr = quick
    assert rendered() == expected
    sandbox.has_generation_blocks(template)
    tuned = sandbox._compile_jinja_template(template).environment
    assert tuned.getattr.__qualname__ == quick.__qualname__
    assert tuned.filters["tojson"].__qualname__ == sandbox._remembered(str).__qualname__


WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson(indent=4) }}{{ t | tojson }}{{ t.function | tojson(sort_keys=true) }}"
    "{% endfor %}"
    "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.reasoning_content }}{{ m.thinking }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{{ c.when }}{% endfor %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"b": None, "a": [1, 2.5, True]}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"z": 1, "a": 2}}}],
}
UNLIKE_JSON: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None]] = {
    "reasoning": ({"role": "assistant", "content": "x", "reasoning": "because"}, None),
    "a date": ({**CALL, "tool_calls": [{**CALL["tool_calls"][0], "when": datetime.date(2025, 1, 2)}]}, None),
    "a number of numpy": (CALL, [{"function": {"name": np.str_("add"), "n": np.int64(3)}}]),
    "a number as a key": (CALL, [{"function": {1: 2}}]),
    "a tuple": (CALL, [{"function": {"required": ("a", "b")}}]),
}


def test_rows_of_plain_json_are_written_as_transformers_writes_them() -> None:
    messages = [{"role": "user", "content": "2 + 3?"}, CALL, {"role": "tool", "content": "5", "name": "add"}]
    assert sandbox.are_plain(messages, [TOOL])
    written = {
        sandbox.render(WITH_TOOLS, messages, [TOOL], {}, is_plain=is_plain)[0] for is_plain in (True, False, True)
    }
    assert len(written) == 1 and '    "type": "function"' in written.pop()


@pytest.mark.parametrize("what", UNLIKE_JSON)
def test_what_transformers_would_change_is_not_plain(what: str) -> None:
    message, tools = UNLIKE_JSON[what]
    assert not sandbox.are_plain([message], tools)
    renderer = sandbox.render(WITH_TOOLS, [message], tools, {})[0]
    (expected,), _ = sandbox.render_jinja_template([[message]], tools, chat_template=WITH_TOOLS)
    assert renderer == expected


def test_json_is_remembered_by_object_and_by_options() -> None:
    made: list[Any] = []

    def tojson(value: Any, **options: Any) -> str:
        made.append(value)
        return json.dumps(value, **options)

    remembered = sandbox._remembered(tojson)
    one, other = {"a": 1}, {"a": 1}
    for options in ({}, {"indent": 2}, {"separators": (",", ":")}):
        assert [remembered(x, **options) for x in (one, other, one)] == [json.dumps(one, **options)] * 3
    assert len(made) == 6
    assert remembered(one, separators=[",", ":"]) == '{"a":1}'  # an option without a hash
    texts = [remembered({"n": n}) for n in range(3 * sandbox.MOST_REMEMBERED)]  # each dies, and the next has its id
    assert texts == [json.dumps({"n": n}) for n in range(3 * sandbox.MOST_REMEMBERED)]
    listed = [1]
    assert remembered(listed) == "[1]"
    listed.append(2)
    assert remembered(listed) == "[1, 2]"
