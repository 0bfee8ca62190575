"""`main`: runs a command and turns what happens into an exit code. Floor 10.

In: arguments. Out: an exit code.

    0      done
    1      the user can fix it; one message on stderr says how
    2      strop compare, strop replay: there is a difference
    3      stopped by a finding of finetuning.stop_on, and saved; not to be started again as it is
    75     stopped by a signal and saved; the message names the command that continues the run
    130    stopped by Ctrl-C where nothing could be saved
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from strop import garbage_collection
from strop.cli.commands import COMMANDS
from strop.errors import ConfigError, GoneError, Interrupted, PeerError, StoppedByFinding, StropError
from strop.terminal import SECONDS_TO_SPEAK, ReaderLeft, complain, open_standard_streams, rank, session, show

FOUND = 3
RESUMABLE = 75
STOPPED = 130


def main(argv: Sequence[str] | None = None, prog: str = "strop") -> int:
    """Runs a command and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    ctrl_c = _CtrlC()
    try:
        with ctrl_c, session(), garbage_collection.rare():
            return dispatch(arguments)
    except StoppedByFinding as stop:
        if rank() == 0:
            complain(
                f"stopped after step {stop.step} by finetuning.stop_on: {stop.finding}: {stop.claim}\n"
                f"saved in {stop.checkpoint}; report.html beside it says what to try\n"
                f"to go on all the same: {_resume(_without_stop_on(arguments), prog)} --finetuning.stop-on '[]'"
            )
        return FOUND
    except Interrupted as stop:
        if rank() == 0:
            way_on = f"go on with: {_resume(arguments, prog)}"
            complain(f"stopped after step {stop.step}; saved in {stop.checkpoint}\n{way_on}")
        return RESUMABLE
    except ReaderLeft:
        return 0
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or ctrl_c.pressed:
            message = "stopped"
            if arguments[:1] == ["train"] and "--dry-run" not in arguments:
                message += f"; what is in no checkpoint is lost\ngo on with: {_resume(arguments, prog)}"
            complain(message)
            return STOPPED
        if not isinstance(error, StropError):
            raise
        _tell(error)
        return 1


class _CtrlC:
    """Whether Ctrl-C was pressed in a `with` block. A library that is just being imported makes errors of its own of it
    (yaml: an AttributeError; pydantic: a SchemaError or a panic), or it comes where Python drops errors (the end of an
    object). Training has its own answer, `StopSignal`, which asks this handler when it begins."""

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> None:
        handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, or a caller's
        if handled and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, *_: object) -> None:
        self.pressed = True
        raise KeyboardInterrupt


def dispatch(arguments: list[str]) -> int:
    """Runs the command that the arguments begin with, or prints a help text.

    Raises:
        ConfigError: there is no such command.
    """
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-h", "--help", "help"):
        show(_help())
        return 0
    if command == "--version":
        from strop import __version__

        show(f"strop {__version__}\n")
        return 0
    if command not in COMMANDS:
        found = f"there is no command {command[:80]!r}" if command else "no command is given"
        raise ConfigError(found, expected=", ".join(COMMANDS), fix=_instead_of(command, arguments))
    module = COMMANDS[command].load()
    if "-h" in rest or "--help" in rest:
        show(module.usage())
        return 0
    return module.run(rest)


def _tell(error: StropError) -> None:
    """Prints an error once, although several processes may meet it.

    Rank 0 prints it. An error that only this machine can know of is also printed by the first process on the machine.
    A process that is gone is named by strop's own launcher, if that started this one.
    """
    launcher_speaks = isinstance(error, GoneError) and "TORCHELASTIC_RUN_ID" not in os.environ
    first = rank() == 0 or (os.environ.get("LOCAL_RANK") == "0" and not isinstance(error, PeerError))
    if first and not launcher_speaks:
        complain(str(error))
    else:
        time.sleep(SECONDS_TO_SPEAK)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: strop COMMAND ...", "", *lines, "", "  --help, --version", ""])


def _instead_of(command: str, arguments: list[str]) -> str:
    """What to type instead of a command that there is not; empty where nothing is near."""
    from strop.config.flags import is_file
    from strop.config.methods import METHODS
    from strop.config.names import did_you_mean
    from strop.config.other_tools import instead_of

    if command.startswith("--") or is_file(command):
        return f"did you mean strop train {shlex.join(arguments)}?"
    if (method := command.lower()) in METHODS:
        return f"strop train --config FILE --method {method} trains by it, strop methods {method} explains it"
    return instead_of(command) or did_you_mean(command, COMMANDS, "strop ")


def _without_stop_on(arguments: Sequence[str]) -> list[str]:
    """A command line without the key, which must not be given twice."""
    kept: list[str] = []
    follows = False  # whether a word without a dash would be its value
    for token in arguments:
        name, equals, _ = token.partition("=")
        is_key = name.startswith("--") and name[2:].replace("-", "_") in ("stop_on", "finetuning.stop_on")
        if not (is_key or (follows and not token.startswith("--"))):
            kept.append(token)
        follows = is_key and not equals
    return kept


def _resume(arguments: Sequence[str], prog: str) -> str:
    """The same command line, continuing from the newest checkpoint."""
    from strop.config.flags import is_file

    kept: list[str] = []
    follows_resume = False  # whether a word without a dash would be the value of --resume
    for token in arguments:
        value_of_resume = follows_resume and not token.startswith("-") and not is_file(token)
        follows_resume = token == "--resume"
        if not (value_of_resume or follows_resume or token.startswith("--resume=") or token == "--overwrite"):
            kept.append(token)
    if prog.endswith("train.py"):
        kept = kept[1:]
    line = shlex.join([*prog.split(), *kept, "--resume"])
    return f"the same torchrun command, ending in: {line}" if "TORCHELASTIC_RUN_ID" in os.environ else line
