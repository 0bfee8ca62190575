"""`strop init`: a configuration for a model and a data file. Floor 10."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

from strop.cli.parser import Parser
from strop.config.methods import METHODS
from strop.durable import write_file
from strop.errors import ConfigError
from strop.terminal import show

HELP = """\
usage: strop init --model MODEL --data FILE [--val FILE] [--method NAME] [--device NAME] [--output FILE]
                  [--output-dir DIR]

  --model MODEL          a folder, or a name on the hub
  --data FILE            the training rows; without these two, they and the method are asked for on the terminal
  --val FILE             validation rows (default: a tenth of the others)
  --method NAME          default: by the shape of the rows: dpo for pairs, kto for labels, sft for the rest
  --device NAME          the machine that the run must fit: cpu, or a GPU's name, such as h100 (default: this one)
  --output FILE          where the configuration goes (default: strop.yaml); a file that is there is not replaced
  --output-dir DIR       where the run will go (default: outputs)
"""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("init")
    for flag in ("--model", "--data", "--val"):
        parser.once(flag)
    parser.once("--method", choices=tuple(METHODS))
    parser.once("--device")
    parser.once("--output", default="strop.yaml")
    parser.once("--output-dir", default="outputs")
    options = parser.parse_args(arguments)
    path = Path(options.output).expanduser()
    if path.exists():
        raise ConfigError("there is a file of this name", where=str(path), fix="remove it, or give another --output")
    model = options.model or _ask("--model", "Which model (a folder, or a name on the hub)? ")
    data = options.data or _ask("--data", "Which file of rows? ")
    method = options.method or (None if options.model and options.data else _ask_method())

    from strop.newconfig import Request, config_for

    text = config_for(Request(model, data, options.val, method, options.output_dir, options.device))
    try:
        write_file(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror or error}", where=str(path), fix="--output") from error
    command = f"strop train --config {quote(str(path))}"
    show(f"{text}\nwritten to {path}\nnext: {command} --dry-run\nthen: {command}\n")
    return 0


def _ask_method() -> str | None:
    """The method that a person names; None: by the shape of the rows.

    Raises:
        ConfigError: there is no such method.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    question = f"Which method ({', '.join(METHODS)}; empty: the one that fits the rows)? "
    answer = input(question).strip().lower()
    if answer and answer not in METHODS:
        raise ConfigError(f"there is no method {answer[:80]!r}", expected=", ".join(METHODS), fix="strop methods")
    return answer or None


def _ask(flag: str, question: str) -> str:
    """What a person types.

    Raises:
        ConfigError: nobody is there to be asked, or nothing is typed.
    """
    answer = input(question).strip() if sys.stdin is not None and sys.stdin.isatty() else ""
    if not answer:
        raise ConfigError(f"{flag} is missing", fix="see strop init --help")
    return answer
