"""A chat template from somewhere may loop for ever or fill the memory: it is stopped, whatever it does."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    assert sandbox._compile_jinja_template(template).environment.getattr.__qualname__ == quick.__qualname__
