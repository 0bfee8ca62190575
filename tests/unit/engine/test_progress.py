"""What the terminal shows, with and without a terminal, and what a signal does."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess

import pytest

from processes import start_program
from strop.engine import progress
from strop.engine.progress import Progress, StopSignal
from strop.errors import Interrupted

SHOWN = {"loss": 0.6931, "epoch": 0.5, "rewards/margins": 0.0125, "tokens": 100}
RECORD = {"step": 3, "epoch": 0.25, "split": "train", "loss": 0.5, "rewards/margins": -0.1, "learning_rate": 5e-7}


def test_without_a_terminal_one_plain_line_a_record() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        assert not shown.live
        task = shown.task("training", 12)
        for step in range(1, 5):
            task.step(SHOWN)
            if step == 3:
                task.record({**RECORD, "tokens_per_second": 12345.6})
        shown.note("a note with [brackets] and \x1b[31mescapes\x07")
        task.record({**RECORD, "split": "eval"})
    first, note, evaluation = stream.getvalue().splitlines()
    assert first.startswith(
        "train step 3/12  epoch 0.25  loss 0.5000  rewards/margins -0.1000  lr 5.00e-07  tokens/s 12,346"
    )
    assert "elapsed" in first and "left" in first
    assert note == "a note with [brackets] and \N{REPLACEMENT CHARACTER}[31mescapes\N{REPLACEMENT CHARACTER}"
    assert evaluation.startswith("eval step 3/12  epoch 0.25  loss 0.5000") and "left" not in evaluation


def test_a_training_gives_signs_of_life_between_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        task = shown.task("training", 100)
        for step in range(1, 9):
            now += 11.0
            task.step(SHOWN)
            if step == 5:
                task.record({**RECORD, "step": 5})
    first, record, second, _ = stream.getvalue().splitlines()
    assert first == "training: 3 of 100, 0:33 elapsed, 17:47 left, loss 0.6931"
    assert record.startswith("train step 5/100")
    assert second.startswith("training: 8 of 100, 1:28 elapsed")  # 33 seconds after the record


def test_an_evaluation_of_ties_shows_no_accuracy() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        task = shown.task("training", 12)
        tied = {"step": 0, "split": "eval", "loss": 0.6931, "rewards/margins": 0.0, "rewards/accuracies": 0.0}
        task.record(tied)
        task.record({**tied, "step": 2})
        task.record({**tied, "rewards/margins": None, "rewards/chosen": 0.0, "rewards/rejected": 0.0})  # labelled rows
        task.record({**tied, "rewards/chosen": 0.1})  # another reference
    shown = ["rewards/accuracies" in line for line in stream.getvalue().splitlines()]
    assert shown == [False, True, False, True]


def test_a_long_task_without_a_terminal_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        task = shown.task("reference log-probs", 10)
        for _ in range(10):
            now += 7.0
            task.step()
    assert stream.getvalue().splitlines() == [
        "reference log-probs: 5 of 10, 0:35 elapsed, 0:35 left",
        "reference log-probs: 10 of 10, 1:10 elapsed, 0:00 left",
        "reference log-probs: 10 of 10 in 1:10",
    ]


def test_a_short_task_without_a_terminal_says_nothing() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as shown:
        shown.task("evaluation", 2).step(n=2)
    assert stream.getvalue() == ""


SCRIPT = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from strop.terminal import log_to_terminal
log_to_terminal("info")
from strop.engine.progress import Progress
with Progress() as shown:
    print("live", shown.live, file=sys.stderr)
    task = shown.task("training", 40, completed=20)
    for step in range(20):
        time.sleep(0.02)
        task.step({"loss": 0.6931, "epoch": 0.5, "rewards/margins": 0.0125, "tokens": 100 * step})
        if step == 10:
            logging.info("a log line")
            logging.getLogger("strop").info("a line of strop's own log")
            shown.note("a note [red]")
            task.record({"step": 30, "split": "eval", "loss": 0.25})
            inner = shown.task("evaluation", 3)
            for _ in range(3):
                inner.step()
    shown.task("broken off", 5).step()
logging.info("after")
"""


def run_in_a_terminal(term: str, columns: int = 160) -> str:
    leader, follower = pty.openpty()
    process = start_program(SCRIPT, os.ttyname(follower), {**os.environ, "TERM": term, "COLUMNS": str(columns)})
    written = b"".join(said_by(process, leader, follower))
    assert process.exitcode == 0
    return written.decode()


def said_by(process: ForkServerProcess, leader: int, follower: int) -> Iterator[bytes]:
    """What it writes to its terminal, until it ends; closes the terminal."""
    try:
        while (alive := process.is_alive()) or select.select([leader], [], [], 0)[0]:
            if select.select([leader], [], [], 0.05 if alive else 0)[0]:
                yield os.read(leader, 65536)
        process.join()
    finally:
        os.close(follower)
        os.close(leader)


def test_in_a_terminal_a_bar_with_lines_above_it() -> None:
    text = run_in_a_terminal("xterm")
    assert "live True" in text
    for piece in ("training", "/40", "loss 0.6931", "epoch 0.50", "margin 0.0125", "tokens/s"):
        assert piece in text
    plain = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]", "", text)  # no colours, no cursor on and off
    lines = {line.strip() for line in plain.replace("\x1b[2K", "\n").splitlines()}
    own = {"a log line", "a line of strop's own log", "a note [red]", "eval step 30/40  loss 0.2500", "after"}
    assert own <= lines  # each on a line of its own
    last = plain.rpartition("after")[0].rpartition("\x1b[2K")[2]
    assert "broken off" not in last  # no bar is left behind
    assert text.count("\x1b[2K") < 30  # drawn a few times per second, not at every step


@pytest.mark.parametrize("columns", [60, 80, *(pytest.param(n, marks=pytest.mark.nightly) for n in (100, 160))])
def test_a_narrow_bar_keeps_its_count_and_its_times(columns: int) -> None:
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", run_in_a_terminal("xterm", columns))
    assert "\N{HORIZONTAL ELLIPSIS}" not in plain
    assert "loss 0.6931" in plain
    assert ("epoch 0.50" in plain) == (columns >= 80)


PRESSED = """
import sys, time
from strop.engine.progress import Progress
with Progress(live=True) as shown:
    task = shown.task("training", 1000)
    for _ in range(40):
        task.step({"loss": 0.5, "epoch": 0.1})
        time.sleep(0.05)
    shown.note("a note")
    time.sleep(0.5)
print("after", file=sys.stderr)
"""


def screen(written: str, width: int) -> list[str]:
    """The rows that a terminal shows: it wraps, goes up and clears rows, which is all that is used here."""
    rows, y, x = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", written):
        if piece.startswith("\x1b"):
            y = max(0, y - int(piece[2:-1] or 1)) if piece.endswith("A") else y
            if piece == "\x1b[2K":
                rows[y] = ""
        elif piece == "\r":
            x = 0
        else:
            if piece == "\n" or x == width:
                y, x = y + 1, x if piece == "\n" else 0
                rows += [""] * (y == len(rows))
            if piece != "\n":
                rows[y] = rows[y].ljust(x)[:x] + piece + rows[y][x + 1 :]
                x += 1
    return [row.rstrip() for row in rows]


@pytest.mark.parametrize("columns", [60, pytest.param(100, marks=pytest.mark.nightly)])
def test_control_c_leaves_no_bar_behind(columns: int) -> None:
    """The terminal writes ^C where the cursor is, behind the bar."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = start_program(PRESSED, os.ttyname(follower), environment)
    written, pressed = b"", 0
    for chunk in said_by(process, leader, follower):
        written += chunk
        if pressed < 3 and written.count(b"training") > 2 * pressed:
            os.write(leader, b"\x03")
            pressed += 1
    assert process.exitcode == 0
    assert pressed == 3 and written.count(b"^C") == 3
    assert [row for row in screen(written.decode(), columns) if row] == ["a note", "after"]


def test_a_dumb_terminal_gets_plain_lines() -> None:
    text = run_in_a_terminal("dumb")
    assert "live False" in text and "\x1b" not in text and "eval step 30/40" in text


def test_a_terminal_that_goes_away_does_not_stop_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    for live in (False, True):
        with Progress(stream=Gone(), live=live) as shown:
            task = shown.task("training", 3)
            for _ in range(3):
                task.step(SHOWN)
                task.record(RECORD)
                shown.note("text")


def test_log_handlers_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    logger = logging.getLogger("some.library")
    monkeypatch.setattr(logger, "handlers", [handler])
    with Progress(live=True):
        pass
    assert handler.stream is stream and sys.stderr is stream


@pytest.mark.parametrize("live", [False, True])
def test_a_step_costs_next_to_nothing(live: bool) -> None:
    with Progress(stream=io.StringIO(), live=live) as shown:
        task = shown.task("training", 10_000)
        task.step(SHOWN)
        started = time.process_time()
        for _ in range(1000):
            task.step(SHOWN)
        assert (time.process_time() - started) / 1000 < 1e-3  # measured: 2e-5


# ---- signals


def test_the_first_signal_is_a_wish_and_the_handlers_come_back() -> None:
    before = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopSignal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_only_the_third_interrupt_gives_up() -> None:
    said: list[str] = []
    with StopSignal(said.append) as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGTERM"
    wait_for(lambda: len(said) == 3)  # they are said by other threads
    assert sorted(line.partition(" ")[0] for line in said) == ["SIGTERM:", "already", "already"]


def test_without_a_say_it_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    text = ""

    def said() -> bool:
        nonlocal text
        text += capfd.readouterr().err
        return "SIGTERM: stopping after this step, which is saved" in text

    wait_for(said)


def test_a_signal_in_the_middle_of_a_note_does_not_hang() -> None:
    """The handler runs while its own thread holds the stream's lock."""

    class Slow(io.StringIO):
        lock = threading.Lock()

        def write(self, text: str) -> int:
            with self.lock:
                if text.startswith("one"):
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().write(text)

    stream = Slow()
    with Progress(stream=stream) as shown, StopSignal(shown.note):
        shown.note("one")
        wait_for(lambda: "SIGTERM" in stream.getvalue())
    assert stream.getvalue().startswith("one\n")


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(1000):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_installed() -> None:
    seen: list[object] = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]


@pytest.mark.parametrize("ends", [True, False])
def test_signals_of_a_run_that_was_saved_leave_its_exit_code_alone(ends: bool) -> None:
    """Where the process ends with the run, a signal after the save does nothing; else the old handlers are back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(StopSignal, "ends_process", ends)
            with StopSignal(lambda line: None):
                os.kill(os.getpid(), signal.SIGTERM)
                raise Interrupted(3, "checkpoint-3")
        assert (signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]) is not ends
        if ends:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
