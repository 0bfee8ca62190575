"""`strop report`: what is wrong with a run, and a page that shows it. Floor 10."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.terminal import show

if TYPE_CHECKING:
    from strop.report.diagnose import Examined

HELP = """\
usage: strop report RUN [RUN ...] [--output DIR] [--fail-on fail|warn|note] [--threshold NAME=VALUE ...]
       strop report RUN [RUN ...] --watch [--port N] [--threshold NAME=VALUE ...]

  RUN                    a run folder, training.output_dir/NAME, finished or not; several are laid side by side
  --output DIR           where report.html and findings.json go (default: the run folder; for several: ./strop-report)
  --fail-on SEVERITY     exit with 1 where a finding is at least this bad, for scripts
  --threshold NAME=VALUE another threshold for this report; findings.json names those of each finding
  --watch                serve the page to a browser on this computer while the runs go on; it loads itself again, and
                         nothing is written; Ctrl-C ends it
  --port N               of --watch (default: a free one)
"""
RELOAD_SECONDS = 10
FAIL_ON = ("fail", "warn", "note")


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("report")
    parser.add_argument("runs", nargs="*")
    parser.once("--output")
    parser.once("--fail-on", choices=FAIL_ON)
    parser.add_argument("--threshold", action="append", default=[])
    parser.switch("--watch")
    parser.once("--port", type=int)
    options = parser.parse_args(arguments)
    if not options.runs:
        raise ConfigError("no run is given", expected="the folder of a run: strop report outputs/NAME")
    replaced = dict(map(_threshold, options.threshold))
    if options.watch:
        return _watch(options, replaced)
    if options.port is not None:
        raise ConfigError("--port without --watch", fix="add --watch, or leave it out")

    from strop.report.diagnose import exit_code
    from strop.report.findings import Severity
    from strop.report.write import examine, write

    examined = examine(options.runs, replaced)
    page, listed = write(examined, _folder(options, [e.run.path for e in examined]))
    found = [f for e in examined for f in e.diagnosis.findings]
    lines = [line for e in examined for line in _lines(e)]
    show("\n".join([*lines, f"page: {page}", f"findings: {listed}"]) + "\n")
    return exit_code(found, Severity(options.fail_on) if options.fail_on else None)


def _watch(options: argparse.Namespace, replaced: Mapping[str, float]) -> int:
    """Serves the page until Ctrl-C."""
    if unwanted := [name for name in ("output", "fail_on") if getattr(options, name) is not None]:
        raise ConfigError(
            f"--{unwanted[0].replace('_', '-')} with --watch",
            fix="leave it out: nothing is written while a run goes on",
        )

    from strop.report.page import page
    from strop.report.serve import PageServer
    from strop.report.write import examine, state_of

    last: tuple[object, ...] = ()

    def make() -> bytes | None:
        nonlocal last
        now = tuple(state_of(Path(run).expanduser()) for run in options.runs)
        if now == last:
            return None
        found = page(examine(options.runs, replaced), reload=RELOAD_SECONDS).encode("utf-8", "backslashreplace")
        last = now
        return found

    with PageServer(make, options.port or 0) as server:
        server.page()  # what is wrong with the folders is said now, not to a browser
        show(f"{server.address} (Ctrl-C ends it)\n")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


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
    from strop.report.escaping import visible

    yield f"{visible(examined.run.name)}: {visible(examined.diagnosis.verdict)}"
    for finding in examined.diagnosis.raised:
        yield f"  {finding.severity:<5} {finding.id}: {visible(finding.claim)}"
