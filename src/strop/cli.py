"""The command line: `strop train`, `reference`, `demo`, `methods`, `prepare`, `schema`. Floor 8.

In: arguments. Out: an exit code. 0: done; 1: something to mend, told in one message on stderr; 75: stopped by a signal
and saved, with the command that goes on; 130: stopped by Ctrl-C where nothing could be saved. Configuration and torch
are imported inside the commands, so that `strop --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from strop.errors import ConfigError, Interrupted, StropError
from strop.terminal import ReaderLeft, complain, log_to_terminal, open_standard_streams, rank, session

RESUMABLE = 75
STOPPED = 130

HELP = """\
usage: strop COMMAND ...

  train      train every model of a configuration (strop train --help)
  reference  score the reference of a configuration ahead of its runs (strop reference --help)
  demo       a real training run on this machine, one to three minutes, with nothing to download
  methods    what there is to train by; strop methods NAME: formula, settings, data, metrics
  prepare    files of rows into split files: checked, without duplicates, with statistics (strop prepare --help)
  schema     print the JSON Schema of configuration files

  --help, --version
"""

TRAIN_HELP = """\
usage: strop train --config FILE [--preset NAME] [--dry-run] [--resume [auto|PATH]] [any key of the configuration]

  --config FILE          the configuration
  --preset NAME          cpu, gpu-bf16, gpu-fp16, memory-efficient, or a path
  --dry-run              validate, read the data, show one example and the plan, stop; needs config.json, no weights
    --no-time            do not time the processor
    --verbose            say what the estimate leaves out, too
    --device NAME        judge another machine: cpu, or a GPU's name, such as h100
    --device-memory SIZE judge this much memory, such as 24GiB
  --model-index N        train only the N-th model of the file, from 0
  --resume [auto|PATH]   go on from the newest complete checkpoint, or from this one; start where there is none
  --overwrite            start anew in a folder that holds another run
  --allow-changes        resume although data or settings that change the result have changed; it is recorded
"""


class _Parser(argparse.ArgumentParser):
    """Strict: no abbreviations, no flag twice, errors are raised."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"strop {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        from strop.config.foreign import instead_of
        from strop.config.names import closest

        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        close = closest(unknown, self.flags)
        if unknown:
            message = f"unknown flag {unknown}" if unknown.startswith("-") else f"{unknown!r} belongs to no flag"
        meant = f"did you mean {close}?" if close else f"see {self.prog} --help"
        raise ConfigError(message, fix=instead_of(unknown) or meant)

    @property
    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def once(self, *flags: str, **settings: Any) -> None:
        """A flag that may be given once."""
        self.add_argument(*flags, action=_Once, **settings)


class _Once(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.dest in (seen := vars(namespace).setdefault("_seen", set())):
            raise ConfigError(f"{option_string} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


def main(argv: Sequence[str] | None = None, prog: str = "strop") -> int:
    """Runs a command and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    try:
        with session():
            return _dispatch(arguments)
    except StropError as error:
        complain(str(error))
        return 1
    except Interrupted as stop:
        if rank() == 0:
            way_on = f"go on with: {_resume(arguments, prog)}"
            complain(f"stopped after step {stop.step}; saved in {stop.checkpoint}\n{way_on}")
        return RESUMABLE
    except KeyboardInterrupt:
        began = arguments[:1] == ["train"] and "--dry-run" not in arguments
        way_on = f"; what is in no checkpoint is lost\ngo on with: {_resume(arguments, prog)}"
        complain("stopped" + way_on * began)
        return STOPPED
    except ReaderLeft:
        return 0


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-h", "--help", "help"):
        return _print(HELP)
    if command == "--version":
        from strop import __version__

        return _print(f"strop {__version__}\n")
    if command not in COMMANDS:
        found = f"there is no command {command[:80]!r}" if command else "no command is given"
        raise ConfigError(found, expected=", ".join(COMMANDS), fix=_instead_of_command(command, arguments))
    return COMMANDS[command](rest)


def _instead_of_command(command: str, arguments: list[str]) -> str:
    from strop.config.foreign import instead_of
    from strop.config.methods import METHODS
    from strop.config.names import closest

    if command.startswith("--"):
        return f"did you mean strop train {shlex.join(arguments)}?"
    if (method := command.lower()) in METHODS:
        return f"strop train --config FILE --method {method} trains by it, strop methods {method} explains it"
    if instead := instead_of(command):
        return instead
    return f"did you mean strop {close}?" if (close := closest(command, COMMANDS)) is not None else ""


# ---- commands


def _train(arguments: list[str]) -> int:
    if any(token in ("-h", "--help") for token in arguments):
        return _train_help()
    from strop.config import load_config
    from strop.config.flags import split_flags

    parser = _Parser("train")
    parser.once("--config")
    parser.once("--preset")
    parser.once("--model-index", type=int)
    parser.once("--resume", nargs="?", const="auto")
    for flag in ("--device", "--device-memory"):
        parser.once(flag)
    for switch in ("--dry-run", "--no-time", "--verbose", "--overwrite", "--allow-changes"):
        parser.once(switch, nargs=0, default=False)
    overrides, rest = split_flags(arguments, parser.flags)
    options = parser.parse_args(rest)
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite are both given", fix="choose one")
    if options.resume == "":
        raise ConfigError("--resume is empty", expected="auto, the path of a checkpoint, or nothing after it")
    memory = _device_memory(options)
    config = load_config(options.config, preset=options.preset, overrides=overrides)
    log_to_terminal(config.logging.log_level)
    _look(config, options.model_index, options.resume, needs_weights=not options.dry_run)
    if options.dry_run:
        from strop.dryrun import dry_run

        machine = {"device": options.device, "memory": memory}
        told = {"timed": not options.no_time, "verbose": options.verbose}
        dry_run(config, model_index=options.model_index, **machine, **told)
        return 0

    from strop.training import train

    train(
        config,
        model_index=options.model_index,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_changes=options.allow_changes,
    )
    return 0


def _look(config: Any, model_index: int | None, resume: str | None = None, *, needs_weights: bool = True) -> None:
    """Refuses what is not there before torch is imported, which takes seconds."""
    from strop.preflight import check

    check(config, model_index=model_index, resume=resume, needs_weights=needs_weights)


def _device_memory(options: argparse.Namespace) -> int | None:
    """Bytes of `--device-memory`.

    Raises:
        ConfigError: it is no size, or a flag of the dry run is given without it.
    """
    from strop.machine import bytes_of

    switches = {"--no-time": options.no_time, "--verbose": options.verbose}
    given = {**switches, "--device": options.device, "--device-memory": options.device_memory}
    if not options.dry_run and (flags := [flag for flag, value in given.items() if value]):
        found = f"{' and '.join(flags)} without --dry-run"
        raise ConfigError(found, expected="a dry run: a run takes the machine it is on", fix="add --dry-run")
    return None if options.device_memory is None else bytes_of(options.device_memory)


def _train_help() -> int:
    from strop.config.reference import LAYERS, key_help

    width = min(shutil.get_terminal_size().columns, 120)
    return _print(f"{TRAIN_HELP}\n{LAYERS}\n{key_help(width)}")


def _reference(arguments: list[str]) -> int:
    if any(token in ("-h", "--help") for token in arguments):
        return _print("usage: strop reference --config FILE [--preset NAME] [--model-index N] [any key]\n")
    from strop.config import load_config
    from strop.config.flags import split_flags

    parser = _Parser("reference")
    for flag, kind in (("--config", str), ("--preset", str), ("--model-index", int)):
        parser.once(flag, type=kind)
    overrides, rest = split_flags(arguments, parser.flags)
    options = parser.parse_args(rest)
    config = load_config(options.config, preset=options.preset, overrides=overrides)
    log_to_terminal(config.logging.log_level)
    _look(config, options.model_index)

    from strop.references import fill_references

    fill_references(config, model_index=options.model_index)
    return 0


def _demo(arguments: list[str]) -> int:
    if any(token in ("-h", "--help") for token in arguments):
        return _print("usage: strop demo [--seed N] [--output-dir DIR]\n")
    parser = _Parser("demo")
    parser.once("--seed", type=int, default=0)
    parser.once("--output-dir", default="runs/demo")
    options = parser.parse_args(arguments)
    _check_seed(options.seed)
    log_to_terminal("info")

    from strop.demo import run_demo

    run_demo(options.seed, Path(options.output_dir))
    return 0


def _prepare(arguments: list[str]) -> int:
    from strop.config.methods import METHODS
    from strop.data.split_files import HELP, prepare

    if any(token in ("-h", "--help") for token in arguments):
        return _print(HELP)
    parser = _Parser("prepare")
    for files in ("--input", "--val-input"):
        parser.add_argument(files, nargs="+", action="extend", default=[])
    parser.once("--output-dir")
    parser.once("--method", choices=tuple(METHODS), default="sft")
    parser.once("--example", choices=tuple(METHODS))
    parser.once("--val-fraction", type=float, default=0.1)
    parser.once("--seed", type=int, default=42)
    parser.once("--keep-duplicates", nargs=0, default=False)
    parser.once("--on-trailing-user", choices=("refuse", "drop"), default="refuse")
    for name in ("prompt", "chosen", "rejected", "completion", "label"):
        parser.once(f"--{name}-column", default=name)
    options = parser.parse_args(arguments)
    _check_seed(options.seed)
    log_to_terminal("info")
    return _print("\n".join(prepare(options)) + "\n")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed is {seed}", expected="a whole number of at least 0 and below 4294967296")


def _schema(arguments: list[str]) -> int:
    if any(token in ("-h", "--help") for token in arguments):
        return _print("usage: strop schema [--format json|markdown]\n")
    parser = _Parser("schema")
    parser.once("--format", choices=("json", "markdown"), default="json")
    options = parser.parse_args(arguments)

    from strop.config.reference import json_schema, markdown

    return _print(json_schema() if options.format == "json" else markdown())


def _methods(arguments: list[str]) -> int:
    if any(token in ("-h", "--help") for token in arguments):
        return _print("usage: strop methods [NAME]\n")
    from strop.config.methods import METHODS

    if len(arguments) > 1:
        raise ConfigError(
            f"{len(arguments)} names are given", expected="one, or none for the list", fix="name one method"
        )
    if arguments and arguments[0] not in METHODS:
        given = arguments[0][:80]
        raise ConfigError(
            f"there is no method {given!r}",
            expected=f"one of {', '.join(METHODS)}",
            fix=_instead_of_method(given.lower()),
        )
    if not arguments:
        from strop.config.reference import method_list

        return _print(method_list())
    from strop.catalogue import explanation

    return _print(explanation(arguments[0], min(shutil.get_terminal_size().columns, 120)))


def _instead_of_method(given: str) -> str:
    from strop.config.foreign import instead_of
    from strop.config.methods import METHODS, LossType
    from strop.config.names import closest

    if given in get_args(LossType):
        return "it is a loss_type of dpo: strop methods dpo"
    close = closest(given, METHODS)
    return instead_of(given) or (f"did you mean strop methods {close}?" if close is not None else "")


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "train": _train,
    "reference": _reference,
    "demo": _demo,
    "methods": _methods,
    "prepare": _prepare,
    "schema": _schema,
}


# ---- the terminal


def _print(text: str) -> int:
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


def _resume(arguments: Sequence[str], prog: str) -> str:
    """The same command line, going on from the newest checkpoint."""
    kept: list[str] = []
    skipping = False  # the value of --resume
    for token in arguments:
        if token == "--resume" or token.startswith("--resume=") or token == "--overwrite":
            skipping = token == "--resume"
        elif skipping and not token.startswith("-"):
            skipping = False
        else:
            skipping = False
            kept.append(token)
    if prog.endswith("train.py"):
        kept = kept[1:]
    line = shlex.join([*prog.split(), *kept, "--resume"])
    return f"the same torchrun command, ending in: {line}" if "TORCHELASTIC_RUN_ID" in os.environ else line
