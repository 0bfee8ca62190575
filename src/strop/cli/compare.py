"""`strop compare`: the first step at which two runs part, and what differs first. Floor 10."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.terminal import show

if TYPE_CHECKING:
    from strop.report.compare import Parting

HELP = """\
usage: strop compare RUN RUN [--json]

  RUN     a run folder with ledger.jsonl, finished or not
  --json  for programs

Names the first step at which two runs are not the same, and what differs first there: settings, data order, rows,
weights, rounding or hardware. Differences of settings and environment that do not explain it are listed, too. The exit
code is 0 where both are the same in all steps that both have, and 2 where they part.
"""
PARTED = 2


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("compare")
    parser.add_argument("runs", nargs="*")
    parser.switch("--json")
    options = parser.parse_args(arguments)
    if len(options.runs) != 2:
        raise ConfigError(f"{len(options.runs)} runs are given", expected="two: strop compare RUN RUN")

    from dataclasses import asdict

    from strop.durable import to_json
    from strop.report.compare import compare

    found = compare(*(Path(name).expanduser().absolute() for name in options.runs))
    show(to_json(asdict(found), indent=2) + "\n" if options.json else "\n".join(_lines(found, options.runs)) + "\n")
    return 0 if found.step is None else PARTED


def _lines(found: Parting, names: list[str]) -> Iterator[str]:
    from strop.report.escaping import visible

    yield f"{names[0]}: {found.num_steps[0]:,} steps; {names[1]}: {found.num_steps[1]:,} steps"
    if found.step is None:
        yield f"{found.words}."
    else:
        before = f"the same up to step {found.step - 1}; " if found.step > 1 else ""
        yield f"{before}they part at step {found.step}, by {found.kind}:"
        yield f"  {visible(found.words)}"
    for title, lines in (("settings that differ", found.settings), ("environments differ in", found.environment)):
        if lines:
            yield f"{title}:"
            yield from (f"  {visible(line)}" for line in lines)
