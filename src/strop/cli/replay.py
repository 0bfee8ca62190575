"""`strop replay`: a step of a run taken again, and compared with what the run wrote down. Floor 10."""

from __future__ import annotations

import sys
from pathlib import Path

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.report.ledgers import ledger_path
from strop.terminal import log_to_terminal, rank, show

HELP = """\
usage: strop replay RUN --step N [--rows] [--json]

  RUN       a run folder with ledger.jsonl, finished or not
  --step N  the optimizer step, from 1
  --rows    show the rows of the step: tokens coloured by their log-probs, rewards, margins, shares of the gradient
  --json    for programs

Builds the run again from its config.yaml, starts from the nearest checkpoint before the step, or from the initial model
where there is none, takes all steps up to it, and compares each with the ledger. Nothing is written into the run
folder. As many processes do it as took the step in the run, where this machine has a device for each. With another
number of processes, a step is the same but for rounding, and for the masks of lora_dropout. The exit code is 0 where
the steps are the same to the last bit, and 2 where they are not.
"""
DIFFERENT = 2


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("replay")
    parser.add_argument("run", nargs="*")
    parser.once("--step", type=int)
    parser.switch("--rows")
    parser.switch("--json")
    options = parser.parse_args(arguments)
    if len(options.run) != 1:
        raise ConfigError(f"{len(options.run)} runs are given", expected="one: strop replay RUN --step N")
    if options.step is None:
        raise ConfigError("no step is given", expected="strop replay RUN --step N", fix="ledger.jsonl lists the steps")
    log_to_terminal("info")
    folder = Path(options.run[0]).expanduser().absolute()
    ledger_path(folder)  # before imports that take seconds

    from strop.device import num_gpus
    from strop.distributed import find_place
    from strop.engine.environment import processes_at

    size = processes_at(folder, options.step)
    has_devices = num_gpus() == 0 or num_gpus() >= size
    if size > 1 and has_devices and find_place() is None:
        from strop.launch import launch

        return launch(["replay", *arguments], size)

    from strop.durable import to_json
    from strop.replay.display import as_json, lines
    from strop.replay.retake import replay

    found = replay(folder, options.step, with_rows=options.rows)
    if rank():
        return 0  # the first process tells
    if options.json:
        show(to_json(as_json(found), indent=2) + "\n")
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        with console.capture() as captured:
            for line in lines(found):
                console.print(line)
        show(captured.get())
    else:
        show("".join(f"{line.plain}\n" for line in lines(found)))
    return 0 if found.first_difference is None else DIFFERENT
