"""All checks of a run, in order, and the verdict. Floor 2.

A cause is reported, and what follows from it is not: a rate of 0 explains a loss that does not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from strop.report.checks import course, data, pairs, sampled_groups, start, unpaired
from strop.report.facts import Facts
from strop.report.findings import ORDER, Finding, Remedy, Severity, Thresholds
from strop.report.run_record import RunRecord

Check = Callable[[Facts], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    *start.CHECKS,
    *data.CHECKS,
    *course.CHECKS,
    *pairs.CHECKS,
    *unpaired.CHECKS,
    *sampled_groups.CHECKS,
    *course.GENERAL,
)
"""In the order in which findings of one severity are listed: exact ones first."""


@dataclass(frozen=True)
class Diagnosis:
    """findings: from the worst to what was not checked."""

    findings: tuple[Finding, ...]

    def of(self, *severities: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity in severities]

    @property
    def raised(self) -> list[Finding]:
        """What a person should look at, the worst first."""
        return self.of(Severity.FAIL, Severity.WARN, Severity.NOTE)

    @property
    def verdict(self) -> str:
        """The run in one sentence."""
        failed, others, notes = self.of(Severity.FAIL), self.of(Severity.WARN), self.of(Severity.NOTE)
        if failed:
            more = len(failed) - 1
            tail = f" (and {more} more {'problem' if more == 1 else 'problems'})" if more else ""
            return f"Something is wrong: {_lower(failed[0].claim)}{tail}"
        if others:
            many = f"{len(others)} things are worth a look, first" if len(others) > 1 else "One thing is worth a look"
            return f"{many}: {_lower(others[0].claim)}"
        left = len(self.of(Severity.UNCHECKED))
        tail = f" {left} {'check' if left == 1 else 'checks'} could not be made." if left else ""
        if notes:
            tail += f" Good to know: {_lower(notes[0].claim)}{' (and more below)' if len(notes) > 1 else ''}"
        return f"Nothing looks wrong: {len(self.of(Severity.OK))} checks passed.{tail}"


@dataclass(frozen=True)
class Examined:
    """A run with what was found."""

    run: RunRecord
    diagnosis: Diagnosis
    thresholds: Thresholds


def _lower(sentence: str) -> str:
    """A sentence as it stands after a colon."""
    first, rest = sentence[:1], sentence[1:]
    return first.lower() + rest if rest[:1].islower() or rest[:1] == " " else sentence


def diagnose(run: RunRecord, thresholds: Thresholds | None = None) -> Diagnosis:
    """Makes all checks of a run. Where one finding explains another, only the first is shown: as a FAIL, if the other
    was one."""
    facts = Facts(run, thresholds or Thresholds())
    found = [_worth_trying(finding, run) for check in CHECKS for finding in check(facts)]
    explained = {id_ for f in found if f.severity in (Severity.FAIL, Severity.WARN) for id_ in f.explains}
    worst = {f.id for f in found if f.severity is Severity.FAIL}
    shown = [
        replace(f, severity=Severity.FAIL) if f.severity is Severity.WARN and worst & {*f.explains} else f
        for f in found
        if f.id not in explained or f.severity is Severity.UNCHECKED
    ]
    return Diagnosis(tuple(sorted(shown, key=lambda f: ORDER.index(f.severity))))


def _worth_trying(finding: Finding, run: RunRecord) -> Finding:
    """Without remedies that ask for what the run has already, or for what its configuration does not know."""

    def helps(remedy: Remedy) -> bool:
        known = all(key in run.settings for key in remedy.settings)
        return known and any(run.settings[key].value != value for key, value in remedy.settings.items())

    return replace(finding, remedies=tuple(r for r in finding.remedies if not r.settings or helps(r)))


def exit_code(findings: Sequence[Finding], fail_on: Severity | None) -> int:
    """1 where a finding is at least as bad as `fail_on`."""
    if fail_on is None:
        return 0
    return int(any(ORDER.index(f.severity) <= ORDER.index(fail_on) for f in findings))
