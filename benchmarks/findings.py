"""Whether findings are right: healthy runs of every method, and runs that are broken on purpose.

    python -m benchmarks.findings [--only TEXT ...] [--seeds 0,1,2] [--write] [--picture FILE.png]

The runs are those of `benchmarks/scenarios.py`. A healthy run must raise no `fail`, and few of lesser weight; a broken
one must raise the finding that it was made for first, with every seed, which draws other rows and other steps. `--only`
takes the runs whose name has one of these texts. `--write` puts each row into the table of docs/findings.md as soon as
it is known. `--picture` takes one of the page that the README shows, with chromium. The exit code is 1 where one of
them does not do so.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scenarios import UNTRIED, Scenario, scenarios, trained, write_models

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "findings.md"
BEGIN, END = "<!-- calibration: python -m benchmarks.findings --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Outcome:
    """raised: id and severity of each finding, in order."""

    scenario: Scenario
    raised: Sequence[tuple[str, str]]

    @property
    def is_right(self) -> bool:
        if self.scenario.first:
            return bool(self.raised) and self.raised[0][0] == self.scenario.first
        return all(severity != "fail" for _, severity in self.raised)


def outcome(scenario: Scenario, run: Path) -> Outcome:
    from strop.report.write import examine

    (examined,) = examine([run])
    return Outcome(scenario, [(f.id, str(f.severity)) for f in examined.diagnosis.raised])


HEAD = ("| run | must raise first | told, in order | |", "|---|---|---|---|")


def row(outcomes: Sequence[Outcome]) -> str:
    """A line of Markdown for a run with several seeds. What is told is that of the first seed, and of those that are
    wrong."""
    scenario, wrong = outcomes[0].scenario, [o for o in outcomes if not o.is_right]
    told = "; but: ".join(
        ", ".join(f"{id_} ({severity})" for id_, severity in o.raised) or "nothing"
        for o in (outcomes[0], *(o for o in wrong if o is not outcomes[0]))
    )
    first = f"`{scenario.first}`" if scenario.first else "no `fail`"
    many = f" with {len(outcomes)} seeds" if len(outcomes) > 1 else ""
    verdict = f"right{many}" if not wrong else f"**wrong** with {len(wrong)} of {len(outcomes)}"
    return f"| {scenario.name} | {first} | {told} | {verdict} |"


def written(page: str, outcomes: Sequence[Sequence[Outcome]]) -> str:
    """The page with these outcomes, one or several of each run, in its table; rows of other runs stay."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines() if line.startswith("| ")}
    rows |= {of_run[0].scenario.name: row(of_run) for of_run in outcomes}
    kept = [rows[s.name] for s in scenarios() if s.name in rows]
    right = sum("**wrong**" not in line for line in kept)
    listed = "\n".join([*HEAD, *kept, "", f"{right} of {len(kept)} are right. No run is broken for these:", ""])
    listed += "".join(f"\n- `{id_}`: {why}" for id_, why in UNTRIED.items())
    return f"{before}{BEGIN}\n\n{listed}\n\n{END}{after}"


SHOWN = "chosen and rejected exchanged in training"
"""The run whose page the README shows."""


def picture(target: Path) -> None:
    """The upper part of a page, as a person sees it."""
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("--picture needs chromium on the PATH")
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_models(Path())
        run = trained(next(s for s in scenarios() if s.name == SHOWN), Path()).absolute()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,620"]
        flags += ["--blink-settings=preferredColorScheme=1", "--user-data-dir=profile", "--screenshot=page.png"]
        subprocess.run([browser, *flags, (run / "report.html").as_uri()], check=True, capture_output=True)
        target.write_bytes(Path("page.png").read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", type=lambda name: Path(name).absolute())
    options = parser.parse_args(arguments)
    if options.picture is not None:
        picture(options.picture)
        return 0
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    from strop.errors import StropError

    outcomes, has_ended = [], False
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        for scenario in scenarios():
            if not any(text in scenario.name for text in options.only):
                continue
            try:
                of_seeds = [outcome(scenario, trained(scenario, Path(name), seed)) for seed in options.seeds]
            except StropError as error:
                print(f"{scenario.name}: {error}", flush=True)
                has_ended = True
                continue
            outcomes.append(of_seeds)
            print(row(of_seeds), flush=True)
            if options.write:
                PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), outcomes), encoding="utf-8")
    return int(has_ended or not all(o.is_right for of_run in outcomes for o in of_run))


if __name__ == "__main__":
    sys.exit(main())
