"""All checks of a run, in order, and the verdict. Floor 2.

A cause is told, and what follows from it is not: a rate of 0 explains a loss that does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from strop.report.checks import course, pairs, rows, start, unpaired
from strop.report.facts import Facts
from strop.report.findings import ORDER, Finding, Severity, Thresholds
from strop.report.reading import RunRecord

Check = Callable[[Facts], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    *start.CHECKS,
    *rows.CHECKS,
    *course.CHECKS,
    *pairs.CHECKS,
    *unpaired.CHECKS,
    *course.GENERAL,
)
"""In the order in which findings of one severity are told: exact ones first."""


@dataclass(frozen=True)
class Diagnosis:
    """findings: from the worst to what was not checked."""

    findings: tuple[Finding, ...]

    def of(self, *severities: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity in severities]

    @property
    def verdict(self) -> str:
        """The run in one sentence."""
        failed, looked = self.of(Severity.FAIL), self.of(Severity.WARN, Severity.NOTE)
        if failed:
            more = len(failed) - 1
            others = f" (and {more} more {'problem' if more == 1 else 'problems'})" if more else ""
            return f"Something is wrong: {_lower(failed[0].claim)}{others}"
        if looked:
            warned = self.of(Severity.WARN)
            first = (warned or looked)[0].claim
            many = f"{len(looked)} things are" if len(looked) > 1 else "One thing is"
            return f"Nothing is clearly wrong. {many} worth a look, first: {_lower(first)}"
        left = len(self.of(Severity.UNCHECKED))
        tail = f" {left} {'check' if left == 1 else 'checks'} could not be made." if left else ""
        return f"Nothing looks wrong: {len(self.of(Severity.OK))} checks passed.{tail}"


def _lower(sentence: str) -> str:
    """A sentence to stand behind a colon."""
    first, rest = sentence[:1], sentence[1:]
    return first.lower() + rest if rest[:1].islower() or rest[:1] == " " else sentence


def diagnose(run: RunRecord, thresholds: Thresholds | None = None) -> Diagnosis:
    """Everything that is looked for."""
    facts = Facts(run, thresholds or Thresholds())
    found = [_worth_trying(finding, run) for check in CHECKS for finding in check(facts)]
    told = {f.id for f in found if f.severity in (Severity.FAIL, Severity.WARN)}
    explained = {id_ for f in found if f.id in told for id_ in f.explains if id_ != f.id}
    kept = [f for f in found if f.id not in explained or f.severity in (Severity.OK, Severity.UNCHECKED)]
    kept = [f for f in kept if not (f.id in explained and f.severity == Severity.OK)]
    return Diagnosis(tuple(sorted(kept, key=lambda f: ORDER.index(f.severity))))


def _worth_trying(finding: Finding, run: RunRecord) -> Finding:
    """Without remedies that ask for what the run has already, or for what its configuration does not know."""
    kept = [
        r
        for r in finding.remedies
        if not r.settings
        or (
            all(key in run.settings for key in r.settings)
            and any(run.settings[key].value != value for key, value in r.settings.items())
        )
    ]
    return replace(finding, remedies=tuple(kept))


def exit_code(findings: Sequence[Finding], fail_on: Severity | None) -> int:
    """1 where a finding is at least as bad as `fail_on`."""
    if fail_on is None:
        return 0
    return int(any(ORDER.index(f.severity) <= ORDER.index(fail_on) for f in findings))
