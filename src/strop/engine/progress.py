"""What the terminal shows of a run, and the signals that stop it. Floor 3.

In: tasks with a total, steps with a few numbers, records, notes. Out, on standard error: if it is a terminal, a live
bar per task with log lines and notes above it; otherwise plain lines, one per record. A thread draws the bar at most
four times per second, so it costs a step about ten microseconds.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self, TextIO

import rich.progress
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text

from strop.config import RunConfig
from strop.errors import Interrupted
from strop.world import World

DRAWS_PER_SECOND = 4
HEARTBEAT_SECONDS = 30.0
"""How often, without a terminal, a task says how far it is, where nothing else is said of it."""
WORTH_A_LINE_SECONDS = 5.0
SPEED_STEPS = 20
"""Tokens per second are measured over this many last steps."""
RECORD_LINE = ("loss", "rewards/margins", "rewards/accuracies", "learning_rate", "grad_norm", "tokens_per_second")
"""Metrics that the line of a record shows, in this order, if the record has them."""
REWARDS = ("rewards/margins", "rewards/chosen", "rewards/rejected")
NARROWEST_BAR = 6
CLOCK_WIDTH = 7
"""Characters of 0:00:00."""
ECHO_WIDTH = 2
"""Columns that a bar leaves free at its end. A terminal shows Ctrl-C as ^C behind the bar; wrapped into the next row,
it would leave the bar's row behind."""
DROPPED_FIRST = ("margin", "epoch", "speed", "loss")
"""What a bar leaves out, in this order, if the terminal is too narrow."""
NAMES = {"learning_rate": "lr", "tokens_per_second": "tokens/s"}


class _Bars(rich.progress.Progress):
    """Bars as wide as the terminal, but for the room that Ctrl-C needs."""

    def __init__(self, *columns: rich.progress.ProgressColumn, console: Console, **settings: Any) -> None:
        self._terminal = console  # which `rich` asks for a table before it has it
        super().__init__(*columns, console=console, **settings)

    def make_tasks_table(self, tasks: Iterable[rich.progress.Task]) -> Table:
        table = super().make_tasks_table(tasks)
        table.width = max(1, self._terminal.width - ECHO_WIDTH)
        return table


class Progress:
    """Shows progress on the terminal during a `with` block.

    stream: default: standard error. live: show moving bars; default: if the stream is a terminal that can show them.
    quiet: show notes only.
    """

    def __init__(self, *, stream: TextIO | None = None, live: bool | None = None, quiet: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._console = Console(file=self._stream, stderr=True)
        self.quiet = quiet
        self.live = not quiet and (self._can_move() if live is None else live)
        self._bars = _Bars(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[shown]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=DRAWS_PER_SECOND,
            speed_estimate_period=600,  # steps can take minutes
            redirect_stdout=sys.stdout.isatty(),
        )
        self._exit = ExitStack()
        self._open: list[Task] = []
        self._lost = False  # the terminal has gone away; the run goes on

    @classmethod
    def of_run(cls, config: RunConfig, world: World) -> Self:
        """That of a run: rank 0 shows it, unless `logging.log_level` leaves out information."""
        return cls(quiet=not world.is_main or config.logging.log_level in ("warning", "error"))

    def _can_move(self) -> bool:
        return self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    def __enter__(self) -> Self:
        if self.live:
            before = sys.stderr
            self._exit.callback(self._quietly, self._bars.stop)
            self._quietly(self._bars.start)
            for handler in _handlers_on(before):
                handler.setStream(sys.stderr)  # which now prints above the bars
                self._exit.callback(handler.setStream, before)
            for drawer in _rich_handlers():
                self._exit.callback(setattr, drawer, "console", drawer.console)
                drawer.console = self._console  # the one that knows where the bars are
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._open):  # what did not come to its end leaves no bar behind
            task.close()
        self._exit.close()

    def task(self, name: str, total: int, *, completed: int = 0) -> Task:
        """Begins a task with `total` parts, of which an earlier process has done `completed`."""
        task = Task(self, name, total, completed)
        self._open.append(task)
        return task

    def note(self, text: str) -> None:
        """Prints a line, above the bars if they are shown."""
        self._print(text)

    def _report(self, text: str) -> None:
        """Prints a line about how far a task is, unless quiet."""
        if not self.quiet:
            self._print(text)

    def _fitting(self, task: Task, parts: Mapping[str, str]) -> str:
        """As many of `parts` as fit the terminal beside the count and both times, which are always shown."""
        count = 2 * len(str(task.total)) + 1
        taken = len(task.name) + NARROWEST_BAR + count + 2 * CLOCK_WIDTH + 5  # and 5 gaps
        room = self._console.width - ECHO_WIDTH - taken
        left = dict(parts)
        for name in DROPPED_FIRST:
            if len("  ".join(left.values())) <= room:
                break
            left.pop(name, None)
        return "  ".join(left.values())

    def _print(self, text: str) -> None:
        clean = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        if self.live:
            self._quietly(lambda: self._console.print(Text(clean)))
        else:
            self._quietly(lambda: self._stream.write(clean + "\n"))
            self._quietly(self._stream.flush)

    def _quietly(self, draw: Callable[[], object]) -> None:
        if not self._lost:
            try:
                draw()
            except (OSError, ValueError):  # hung up, or closed
                self._lost = True


class Task:
    """One task with a bar. It ends with its last part, or by `close`."""

    def __init__(self, progress: Progress, name: str, total: int, completed: int) -> None:
        self._progress, self.name, self.total, self.completed = progress, name, total, completed
        self._started = self._spoken = time.monotonic()
        self._first = completed
        self._tokens: deque[tuple[float, float]] = deque(maxlen=SPEED_STEPS + 1)
        self._closed = False
        self._text = ""
        if progress.live:
            self._bar = progress._bars.add_task(name, total=total, completed=completed, shown="")

    def step(self, metrics: Mapping[str, Any] | None = None, *, n: int = 1) -> None:
        """Counts `n` more parts as done.

        metrics: values that the bar shows: `epoch`, `loss`, `rewards/margins`, and `tokens` (all so far, from which the
        speed is computed).
        """
        self.completed += n
        if self._progress.live:
            if metrics:
                self._text = self._progress._fitting(self, self._shown(metrics))
            self._progress._bars.update(self._bar, completed=self.completed, shown=self._text)
        else:
            self._heartbeat(metrics)
        if self.completed >= self.total:
            self.close()

    def record(self, record: Mapping[str, Any]) -> None:
        """Shows a line of metrics.jsonl. With a bar, only evaluations are shown."""
        self._spoken = time.monotonic()
        if self._progress.live and record.get("split") == "train":
            return
        parts = [f"{record.get('split', '')} step {record.get('step')}/{self.total}".strip()]
        if isinstance(epoch := record.get("epoch"), int | float):
            parts.append(f"epoch {epoch:.2f}")
        tied = record.get("step") == 0 and not any(record.get(k) for k in REWARDS)  # nothing is won or lost yet
        names = [k for k in RECORD_LINE if not (tied and k.startswith("rewards/"))]
        parts += [f"{NAMES.get(k, k)} {_number(v)}" for k in names if (v := record.get(k)) is not None]
        if record.get("split") == "train":
            parts.append(f"{_clock(time.monotonic() - self._started)} elapsed")
            if (left := self._seconds_left()) is not None:
                parts.append(f"{_clock(left)} left")
        self._progress._report("  ".join(parts))

    def close(self) -> None:
        """Ends the task and removes its bar."""
        if self._closed:
            return
        self._closed = True
        self._progress._open.remove(self)
        seconds = time.monotonic() - self._started
        if self._progress.live:
            self._progress._bars.remove_task(self._bar)
        if seconds >= WORTH_A_LINE_SECONDS:
            self._progress._report(f"{self.name}: {self.completed} of {self.total} in {_clock(seconds)}")

    def _shown(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """The texts beside the bar's count, by name, in the order in which they are shown."""
        parts = {}
        if (epoch := metrics.get("epoch")) is not None:
            parts["epoch"] = f"epoch {epoch:.2f}"
        if (loss := metrics.get("loss")) is not None:
            parts["loss"] = f"loss {_number(loss)}"
        if (margin := metrics.get("rewards/margins")) is not None:
            parts["margin"] = f"margin {_number(margin)}"
        if (tokens := metrics.get("tokens")) is not None:
            now = time.monotonic()
            self._tokens.append((now, tokens))
            then, before = self._tokens[0]
            if now > then:
                parts["speed"] = f"{(tokens - before) / (now - then):,.0f} tokens/s"
        return parts

    def _heartbeat(self, metrics: Mapping[str, Any] | None) -> None:
        """Without a bar: says how far the task is, where nothing has been said of it for a while."""
        now = time.monotonic()
        if now - self._spoken >= HEARTBEAT_SECONDS:
            self._spoken = now
            left = self._seconds_left()
            tail = f", {_clock(left)} left" if left is not None else ""
            if metrics and (loss := metrics.get("loss")) is not None:
                tail += f", loss {_number(loss)}"
            self._progress._report(
                f"{self.name}: {self.completed} of {self.total}, {_clock(now - self._started)} elapsed{tail}"
            )

    def _seconds_left(self) -> float | None:
        done = self.completed - self._first
        if done <= 0:
            return None
        return (time.monotonic() - self._started) / done * max(0, self.total - self.completed)


def _handlers() -> list[logging.Handler]:
    """The handlers of all loggers."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    return [handler for logger in loggers for handler in logger.handlers]


def _handlers_on(stream: TextIO) -> list[logging.StreamHandler[TextIO]]:
    """Every logging handler that writes to `stream`."""
    return [h for h in _handlers() if isinstance(h, logging.StreamHandler) and h.stream is stream]


def _rich_handlers() -> list[RichHandler]:
    """The handlers that draw on a console of their own, on standard error."""
    return [h for h in _handlers() if isinstance(h, RichHandler) and h.console.stderr]


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps, and evaluations between micro-batches.

    A second Ctrl-C only prints a reminder; a third one raises KeyboardInterrupt at once. A repeated SIGTERM does
    nothing, since schedulers send it several times. Outside of the main thread, where Python delivers no signals, no
    handler is installed. If the process was told to ignore Ctrl-C, it stays ignored.

    say: prints a line; it is called in a thread of its own. name: the name of the first signal.
    ends_process: the process ends with a run that was stopped, so the handlers stay. A signal that comes once more,
        after everything was saved, would end the process otherwise, and its exit code would not say that it was saved.
    """

    ends_process: ClassVar[bool] = False

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.requested = False
        self.name = ""
        self._say = say or _say
        self._num_interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if getattr(before, "pressed", False):  # and what it raised was dropped somewhere
                    raise KeyboardInterrupt
                if before is not signal.SIG_IGN:
                    self._before[number] = before if before is not None else signal.SIG_DFL
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self.ends_process and isinstance(error, Interrupted)):
            for number, before in self._before.items():
                signal.signal(number, before)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts >= 3:
                raise KeyboardInterrupt
        if first:
            self.name = signal.Signals(number).name
            self._tell(f"{self.name}: stopping after this step, which is saved; an evaluation ends at once")
        elif number == signal.SIGINT:
            self._tell("already stopping; one more Ctrl-C gives up at once, without saving")

    def _tell(self, text: str) -> None:
        # This handler may interrupt a write to the same stream that holds its lock; another thread can wait for that
        # lock, this one would wait forever. `threading.Thread` takes locks itself, `_thread` does not.
        _thread.start_new_thread(self._say, (text,))


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
