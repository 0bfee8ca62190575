"""Runs chat templates, which are programs that came with a download, within limits. Floor 2.

In: a Jinja source and messages. Out: the text, as `apply_chat_template` of the tokenizer writes it. transformers keeps
templates away from files and from Python's internals, but does not stop nested loops or texts of many gigabytes; here,
rendering a row has a limit of processor time and memory.

The limits are the operating system's: both on Linux, time alone on macOS, none on Windows, and none in a thread that is
not the main one.
"""

from __future__ import annotations

import datetime
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from strop.data.read.row import RowRefused
from strop.data.text.markers import REASONING, Span
from strop.errors import ModelError
from strop.types import Message

SECONDS = 10.0
"""Processor time for one row. A long row takes some milliseconds."""

AGAIN = 0.2
"""Seconds of processor time after which the end of the time is said once more, where a library has swallowed it."""

BYTES = 4 << 30
"""Memory for one row, above what the process had before its batch."""

MOST_REMEMBERED = 256
"""Objects whose JSON is remembered: tools and calls of some rows."""

NOW = "strftime_now"
"""The function that tells templates the day."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

TEMPLATE_ERRORS = (
    jinja2.exceptions.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise on a row it was not written for."""


TEXT = {str}
SCALARS = frozenset({str, int, float, bool, type(None)})
OF_DICT = frozenset(dir(dict))
SAFE_OF_STR = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
"""Attributes of a text that Jinja's sandbox hands on as they are; it wraps the two others."""


@lru_cache
def variables(template: str) -> frozenset[str]:
    """The names that a template looks up: what is handed to it under another one changes nothing. Empty where it is
    broken, which `render` says."""
    try:
        tree = _compile_jinja_template(template).environment.parse(template)
        return frozenset(meta.find_undeclared_variables(tree))
    except jinja2.TemplateError:
        return frozenset()


class _Overtime(BaseException):
    """The time is over. Raised from a signal, caught in this module, and no Exception: Jinja and its filters catch
    those, and go on."""


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    more: Mapping[str, Any],
    *,
    generation_prompt: bool = False,
    track: bool = False,
    is_plain: bool = False,
    date: datetime.date | None = None,
) -> tuple[str, list[Span] | None]:
    """The rendering and, where `track` asks for them, the spans of its generation blocks; None: there are none.

    Args:
        more: what else the template may read: special tokens by name, variables of the configuration and the row.
        is_plain: messages and tools are (`are_plain`).
        date: what the template takes for today; None: the day it is.

    Raises:
        RowRefused: template_error: the template fails on these messages.
        ModelError: the template is broken.
    """
    how: dict[str, Any] = {"add_generation_prompt": generation_prompt, **more}
    try:
        track = has_generation_blocks(template) and track
        # transformers hands on no variable that is no JSON, so the day stands among the template's globals
        compiled = _compile_jinja_template(template)
        compiled.globals[NOW] = compiled.environment.globals[NOW] if date is None else date.strftime
        if is_plain and not track:
            # what transformers does to messages and tools before it renders them would change nothing, but takes longer
            given = {"messages": list(messages), "tools": list(tools) if tools else None, "documents": None}
            return compiled.render(**given, **how), None
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=track,
            **how,
        )
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ModelError(
            f"the tokenizer's chat template is broken: {error.message} (line {error.lineno})",
            expected="a Jinja template",
            fix="fix the chat template beside the tokenizer (chat_template.jinja, or in tokenizer_config.json)",
        ) from error
    except TEMPLATE_ERRORS as error:
        raise RowRefused(
            "template_error",
            f"the chat template fails on this row: {str(error)[:200] or type(error).__name__}",
            expected="messages that the chat template of the model knows",
        ) from error
    return texts[0], [(start, stop) for start, stop in spans[0]] if track else None


def are_plain(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether transformers hands these to a template as they are: plain JSON, and no reasoning, which it hands on under
    further keys."""
    try:
        return (
            all(map(REASONING.isdisjoint, messages))
            and all(map(_is_json, messages))
            and all(map(_is_json, tools or ()))
        )
    except RecursionError:
        return False


def _is_json(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        if {*map(type, value), *map(type, value.values())} == TEXT:
            return True  # most messages hold texts alone
        return all(type(key) is str for key in value) and all(map(_is_json, value.values()))
    return all(map(_is_json, value)) if kind is list else kind in SCALARS


@lru_cache
def has_generation_blocks(template: str) -> bool:
    """Whether the template says itself what an assistant writes; it is compiled on the way."""
    compiled = _compile_jinja_template(template)
    # a chain of dictionaries, which Jinja would walk at every rendering: a third of its time
    compiled.globals = dict(compiled.globals)
    compiled.environment.getattr = _quick(compiled.environment.getattr)
    compiled.environment.filters["tojson"] = _remembered(compiled.environment.filters["tojson"])
    return GENERATION.search(template) is not None


def _remembered(tojson: Callable[..., str]) -> Callable[..., str]:
    """The filter `tojson`, which writes an object once: the renderings of a row repeat its tools and calls, and with an
    indent Python's own encoder writes them, which is slow. The sandbox lets no template change an object."""
    known: dict[tuple[Any, ...], tuple[Any, str]] = {}

    def quick(value: Any, *args: Any, **options: Any) -> str:
        key = (id(value), args, *options.items())
        try:
            found = known.get(key) if type(value) is dict else None
        except TypeError:  # an option that has no hash
            return tojson(value, *args, **options)
        if found is not None:
            return found[1]
        text = tojson(value, *args, **options)
        if type(value) is dict:
            if len(known) >= MOST_REMEMBERED:
                known.clear()
            known[key] = value, text  # with the object, so that its id is no other's
        return text

    return quick


def _quick(getattr_of_sandbox: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """The sandbox's `x.y`, with a shorter way to the same value for what templates read most.

    The sandbox raises and catches an AttributeError for every key of a message that is read as `message.role`, and
    looks at the type of a text again for every method of it: that was half of the time of a rendering.
    """

    def quick(value: Any, name: str) -> Any:
        kind = type(value)
        if kind is dict:
            if name in value and name not in OF_DICT:
                return value[name]
        elif kind is str:
            if name in SAFE_OF_STR:
                return getattr(value, name)
        elif (kind is LoopContext or issubclass(kind, Namespace)) and not name.startswith("_"):
            found = getattr(value, name, None)
            if found is not None and not callable(found):
                return found
        return getattr_of_sandbox(value, name)

    return quick


_watched_by: int | None = None
"""The thread in which the signal that ends a row's time is handled."""


@contextmanager
def time_is_watched() -> Iterator[None]:
    """The signal that ends a row's time is handled in here: for a batch of rows, as saying so takes longer than to set
    the time of one."""
    global _watched_by
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread() or _watched_by:
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    _watched_by = threading.get_ident()
    try:
        yield
    finally:
        _watched_by = None
        signal.signal(signal.SIGVTALRM, before)


class Bounded:
    """Rendering that takes too much processor time, or memory within `bounded_memory`, is an error in here.

    Args:
        where: the row. num_messages: a conversation may take the time of one row more for every hundred messages.

    Raises:
        ModelError: it did.
    """

    def __init__(self, where: object, num_messages: int) -> None:
        self._where, self._seconds = where, SECONDS * (1 + num_messages // 100)
        self._watch = ExitStack()

    def __enter__(self) -> None:
        if _watched_by is None:
            self._watch.enter_context(time_is_watched())
        if _watched_by == threading.get_ident():
            signal.setitimer(signal.ITIMER_VIRTUAL, self._seconds, AGAIN)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if _watched_by == threading.get_ident():
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _Overtime as late:
            error = error or late
        self._watch.close()
        if not isinstance(error, _Overtime | MemoryError):
            return
        limit = f"{self._seconds:g} seconds" if isinstance(error, _Overtime) else f"{BYTES >> 30} GiB of memory"
        raise ModelError(
            f"the chat template takes more than {limit} for one row",
            where=str(self._where),
            expected="some milliseconds and little memory",
            fix="look at the template before you trust it, or set dataset.template to one that is shipped",
        ) from error


def _stop(number: int, frame: object) -> NoReturn:
    raise _Overtime


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The process gets so much memory more and no more: for a batch of rows, as asking how much it has takes time."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split(maxsplit=1)[0])
    except (ImportError, OSError):  # not Linux
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + BYTES
    if any(limit != resource.RLIM_INFINITY and limit <= wanted for limit in (before, most)):
        yield  # there is a lower limit already
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
