"""`strop report`: what is wrong with a run, and a page that shows it. Floor 10."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.terminal import show

if TYPE_CHECKING:
    from strop.report.diagnose import Examined

HELP = """\
usage: strop report RUN [RUN ...] [--output DIR] [--fail-on fail|warn|note] [--threshold NAME=VALUE ...]

  RUN                    a run folder, training.output_dir/NAME, finished or not; several are laid side by side
  --output DIR           where report.html and findings.json go (default: the run folder; for several: ./strop-report)
  --fail-on SEVERITY     exit with 1 where a finding is at least this bad, for scripts
  --threshold NAME=VALUE another threshold for this report; findings.json names those of each finding
"""
FAIL_ON = ("fail", "warn", "note")


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("report")
    parser.add_argument("runs", nargs="*")
    parser.once("--output")
    parser.once("--fail-on", choices=FAIL_ON)
    parser.add_argument("--threshold", action="append", default=[])
    options = parser.parse_args(arguments)
    if not options.runs:
        raise ConfigError("no run is given", expected="the folder of a run: strop report outputs/NAME")
    replaced = dict(map(_threshold, options.threshold))

    from strop.report.diagnose import exit_code
    from strop.report.findings import Severity
    from strop.report.write import examine, write

    examined = examine(options.runs, replaced)
    page, listed = write(examined, _folder(options, [e.run.path for e in examined]))
    found = [f for e in examined for f in e.diagnosis.findings]
    lines = [line for e in examined for line in _lines(e)]
    show("\n".join([*lines, f"page: {page}", f"findings: {listed}"]) + "\n")
    return exit_code(found, Severity(options.fail_on) if options.fail_on else None)


def _folder(options: argparse.Namespace, runs: Sequence[Path]) -> Path:
    if options.output is not None:
        return Path(options.output).expanduser().absolute()
    return runs[0] if len(runs) == 1 else Path("strop-report").absolute()


def _threshold(given: str) -> tuple[str, float]:
    name, equals, text = given.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not equals or not math.isfinite(value):
        raise ConfigError(f"--threshold {given[:80]}", expected="NAME=VALUE with a number, such as drift_warn=0.5")
    return name, value


def _lines(examined: Examined) -> Iterator[str]:
    from strop.report.words import visible

    yield f"{visible(examined.run.name)}: {visible(examined.diagnosis.verdict)}"
    for finding in examined.diagnosis.raised:
        yield f"  {finding.severity:<5} {finding.id}: {visible(finding.claim)}"
