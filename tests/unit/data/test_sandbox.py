"""A chat template from somewhere may loop for ever or fill the memory: it is stopped, whatever it does."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from strop.data import sandbox
from strop.data.chat import Renderer, TextRules
from strop.data.rows import RowRefused
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
