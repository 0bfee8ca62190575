"""The process's terminal: standard streams that fail in words, and the log on stderr. Floor 1.

Whatever quotes a row, a name or a template goes through `escaped` on its way: the log, complaints, the dry run.
`session` is held while a command runs; in it, `log_to_terminal` is called once, when the level is known.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from strop.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

log = logging.getLogger("strop")

SECONDS_TO_SPEAK = 2.0
"""When several processes end, one of them writes the message. The others leave this many seconds later, because a
launcher ends all processes as soon as one has left."""


class ReaderLeft(Exception):  # noqa: N818 (it is not an error)
    """What standard output went to (head, less) has seen enough."""


class _StandardOutput:
    """Standard output, with errors that a command can end with, whichever library writes to it.

    What its encoding cannot write comes as an escape.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failing():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # what Python still holds must not fail again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise ReaderLeft from error
            raise ConfigError(
                f"standard output cannot be written: {error.strerror or error}", fix="make room where it goes to"
            ) from error


def open_standard_streams() -> None:
    """A stream that the caller has closed becomes /dev/null: else the next file opened would get its number, and
    everything that is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def rank() -> int:
    """The rank of this process among several; 0 if there is only one."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def show(text: str) -> None:
    """Writes what a command was asked for to standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for the tab and the line end, and marks that turn the direction of writing."""


def escaped(text: str) -> str:
    """`text` with what steers a terminal written as an escape: messages quote files that nobody may have read."""
    return _STEERING.sub(lambda match: repr(match[0])[1:-1], text)


def complain(message: str) -> None:
    """Write a message to standard error, in letters that every stream and terminal takes."""
    number = rank()
    text = escaped((f"[rank {number}] " if number else "") + message) + "\n"
    with suppress(OSError):  # nobody listens any more
        sys.stderr.write(text.encode(errors="backslashreplace").decode())
        sys.stderr.flush()


class _LogFormatter(logging.Formatter):
    """Messages that cannot steer a terminal. All but information begin with their level, such as `warning: `."""

    def format(self, record: logging.LogRecord) -> str:
        text = escaped(super().format(record))
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def _coloured_level(text: Text) -> Text:
    """Colours the level at the beginning of a log line, and nothing else: numbers and paths keep one colour."""
    for level, style in (("warning", "yellow"), ("error", "bold red"), ("debug", "dim")):
        text.highlight_regex(rf"\A{level}:", style)
    return text


VERBOSITIES = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")  # they set their own level when imported
QUIETED = ("transformers", "datasets", "huggingface_hub", "peft", "bitsandbytes", "torch")


@contextmanager
def session() -> Iterator[None]:
    """Standard output fails in words; at the end the loggers are as they were: a handler that stays behind would write
    to a stream that its owner may have closed by then.

    Raises:
        ReaderLeft, ConfigError: standard output takes no more.
    """
    before = [(x, x.level, list(x.handlers)) for x in (log, *map(logging.getLogger, QUIETED))]
    unset = [name for name in VERBOSITIES if name not in os.environ]
    with warnings.catch_warnings(), redirect_stdout(cast(TextIO, _StandardOutput(sys.stdout))):
        try:
            yield
        finally:
            for name in unset:
                os.environ.pop(name, None)
            for logger, level, handlers in before:
                logger.setLevel(level)
                logger.handlers[:] = handlers


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.debug("%s: %s", record.name, record.getMessage())


def take_over(*libraries: str) -> None:
    """What the loggers of these libraries say goes to strop's log, as details for `log_level: debug`. Python writes it
    to the terminal itself where a library has no handler; a caller's own handlers get it as before."""
    for name in libraries:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Forward) for handler in logger.handlers):
            logger.addHandler(_Forward())


@contextmanager
def warnings_only() -> Iterator[None]:
    """Information that the log would take is left out: of models that are built to be measured, not trained."""
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)


def log_to_terminal(level: str) -> None:
    """Sends the logger `strop` to stderr, and quiets other packages unless `level` is debug.

    Only the first process of several speaks; the others say errors.
    """
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(
            console=Console(stderr=True),
            show_time=False,
            show_level=False,  # the formatter writes it, in the same words as without a terminal
            show_path=False,
            markup=False,
            keywords=[],
            highlighter=cast(Any, _coloured_level),
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter())
    log.addHandler(handler)
    log.setLevel(level.upper() if rank() == 0 else logging.ERROR)
    if level != "debug":
        for variable in VERBOSITIES:
            os.environ.setdefault(variable, "error")
        for name in QUIETED:
            logging.getLogger(name).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
