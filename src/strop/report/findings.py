"""What a finding is, and every threshold with its source. Floor 2.

A finding is one sentence with its numbers, how it is known, when it is harmless, and what to try, in order. Its id is
stable: programs may rely on it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from strop.config.names import did_you_mean
from strop.config.yamlfile import write_value
from strop.errors import ConfigError


class Severity(StrEnum):
    """From what spoils a run to what could not be looked at."""

    FAIL = "fail"
    WARN = "warn"
    NOTE = "note"
    OK = "ok"
    UNCHECKED = "unchecked"


ORDER = tuple(Severity)
Numbers = Mapping[str, float | int | str]
"""What a finding rests on, by name."""


class Evidence(StrEnum):
    """How a finding is known: an identity that must hold; a number that was measured; a rule of thumb, whose threshold
    nobody has published."""

    EXACT = "exact"
    MEASURED = "measured"
    RULE = "rule of thumb"


RUN = "RUN"


@dataclass(frozen=True)
class Remedy:
    """Something to try. settings: keys and their new values, for the command line; none: it is not a setting. look:
    a command that shows something of the run, behind `strop`, with `RUN` for its folder. reads: a part of the page that
    the reader is sent to, `pairs` or `samples`."""

    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    look: Sequence[str] = ()
    reads: str = ""

    def shown(self, before: Mapping[str, Any]) -> str:
        """The settings in short, each with the value before, if it had one; empty without any."""
        parts = []
        for key, value in self.settings.items():
            old = before.get(key)
            words = "" if old is None else f"{write_value(old)} → "
            parts.append(f"{key.rpartition('.')[2]} {words}{write_value(value)}")
        return ", ".join(parts)

    def command(self, run: Path, number: int = 1) -> str:
        """The command that looks at the run, or that trains it again with these settings, in another folder; empty
        without either. number: of the remedy, from 1; each has a folder of its own."""
        if not self.settings:
            return (
                shlex.join(["strop", *(str(run) if word == RUN else word for word in self.look)]) if self.look else ""
            )
        folder = f"{run.parent}-retry" + (f"-{number}" if number > 1 else "")
        values = {**self.settings, "training.output_dir": folder}
        flags = [part for key, value in values.items() for part in ("--" + key, write_value(value))]
        return shlex.join(["strop", "train", "--config", str(run / "config.yaml"), *flags])


@dataclass(frozen=True)
class Finding:
    """id: stable. claim: one sentence. numbers: what it rests on, by name. thresholds: names of those it was held
    against. chart: the chart that shows it; level: (value, words) of a line in it, such as a threshold; steps: first
    and last step that it is about. explains: ids of findings that follow from this one and are not listed beside it."""

    id: str
    severity: Severity
    claim: str
    evidence: Evidence = Evidence.MEASURED
    numbers: Numbers = field(default_factory=dict)
    harmless_if: str = ""
    remedies: Sequence[Remedy] = ()
    thresholds: Sequence[str] = ()
    chart: str = ""
    level: tuple[float, str] | None = None
    steps: tuple[float, float] | None = None
    explains: Sequence[str] = ()

    @property
    def section(self) -> str:
        """Where the documentation explains it."""
        return f"docs/findings.md#{self.id}"

    def as_dict(self, run: Path) -> dict[str, Any]:
        """What findings.json holds of it."""
        return {
            "id": self.id,
            "section": self.section,
            "severity": str(self.severity),
            "claim": self.claim,
            "evidence": str(self.evidence),
            "numbers": dict(self.numbers),
            "harmless_if": self.harmless_if,
            "remedies": [
                {"words": r.words, "settings": dict(r.settings), "command": r.command(run, number)}
                for number, r in enumerate(self.remedies, start=1)
            ],
            "thresholds": list(self.thresholds),
            "steps": list(self.steps) if self.steps else None,
        }


def passed(id_: str, claim: str, **more: Any) -> Finding:
    """Looked at, and fine."""
    return Finding(id_, Severity.OK, claim, **more)


def unchecked(id_: str, why: str) -> Finding:
    """Could not be looked at."""
    return Finding(id_, Severity.UNCHECKED, why)


@dataclass(frozen=True)
class Threshold:
    """meaning: what is compared with it, and its unit. source: who says so; "rule of thumb": nobody has published a
    number, and this one was chosen and then tried on healthy and on broken runs (docs/findings.md)."""

    value: float
    meaning: str
    source: str


RULE = "rule of thumb"
THRESHOLDS: Mapping[str, Threshold] = {
    "first_loss": Threshold(1e-3, "share by which a first loss may differ from its identity", "arithmetic"),
    "first_margin": Threshold(0.02, "nats per root of 100 tokens between policy and reference at the start", RULE),
    "trend_lines": Threshold(20, "logged steps that a trend needs", RULE),
    "displaced_note": Threshold(0.05, "nats per token that chosen answers lose", RULE),
    "displaced_warn": Threshold(0.2, "nats per token that chosen answers lose", RULE),
    "displaced_fail": Threshold(0.5, "nats per token that chosen answers lose", RULE),
    "drift_note": Threshold(0.3, "nats per token between policy and reference", RULE),
    "drift_warn": Threshold(0.6, "nats per token between policy and reference", RULE),
    "drift_fail": Threshold(3.0, "nats per token between policy and reference", RULE),
    "saturated_at": Threshold(0.98, "accuracy on training pairs", RULE),
    "saturated_share": Threshold(0.2, "share of the run at that accuracy", RULE),
    "stuck_loss": Threshold(0.01, "nats that a loss stays near ln 2", RULE),
    "stuck_margin": Threshold(0.1, "nats between the sides of a pair that count as learnt nothing", RULE),
    "rate_high_loss": Threshold(0.3, "nats above ln 2 early in the run", RULE),
    "spike_size": Threshold(10, "times the median of the 100 norms before", RULE),
    "spikes_share": Threshold(0.01, "share of steps with a spike", RULE),
    "clipped_share": Threshold(0.95, "share of steps whose gradient is clipped", RULE),
    "moved_share": Threshold(0.1, "share of the weights that an update changes", "rounding of bfloat16"),
    "few_steps": Threshold(50, "optimizer steps", RULE),
    "eval_interval": Threshold(0.05, "half-width of a 95 % interval of an accuracy", "Wilson; arXiv 2411.00640"),
    "risen_note": Threshold(0.01, "share by which an evaluation loss rose above its lowest", RULE),
    "risen_warn": Threshold(0.05, "share by which an evaluation loss rose above its lowest", RULE),
    "worse_fail": Threshold(0.05, "share by which an evaluation loss ends above that before training", RULE),
    "same_pair_warn": Threshold(0.01, "share of pairs whose sides are the same", "arXiv 2410.08847"),
    "same_pair_fail": Threshold(0.2, "share of pairs whose sides are the same", RULE),
    "leaked_fail": Threshold(0.1, "share of validation rows whose prompt is trained on", RULE),
    "duplicates_note": Threshold(0.001, "share of rows that stand there more than once", RULE),
    "duplicates_warn": Threshold(0.05, "share of rows that stand there more than once", RULE),
    "contradictions_warn": Threshold(0.005, "share of rows that another contradicts", RULE),
    "contradictions_fail": Threshold(0.05, "share of rows that another contradicts", RULE),
    "lost_warn": Threshold(0.05, "share of rows that are refused or dropped", RULE),
    "lost_fail": Threshold(0.5, "share of rows that are refused or dropped", RULE),
    "cut_warn": Threshold(0.05, "share of completions that are cut", RULE),
    "cut_fail": Threshold(0.2, "share of completions that are cut", RULE),
    "no_end_warn": Threshold(0.05, "share of completions without an end token", RULE),
    "no_end_fail": Threshold(0.5, "share of completions without an end token", RULE),
    "longer_note": Threshold(0.6, "share of pairs whose chosen side is longer", "arXiv 2407.01085"),
    "longer_warn": Threshold(0.75, "share of pairs whose chosen side is longer", RULE),
    "kl_zero": Threshold(0.8, "share of steps whose divergence is clamped to 0", RULE),
    "labels_ratio": Threshold(4 / 3, "desirable to undesirable, each times its weight", "arXiv 2402.01306"),
    "sft_random": Threshold(1.0, "nats per token above those of tokens drawn at random", RULE),
    "sft_high": Threshold(4.0, "nats per token at the start", RULE),
    "sft_low": Threshold(0.3, "nats per token at the start", RULE),
    "sft_still": Threshold(0.02, "share that the loss has fallen after the whole run", RULE),
    "falls_warn": Threshold(0.05, "nats per token that chosen answers lose without a reference", RULE),
    "falls_fail": Threshold(0.3, "nats per token that chosen answers lose without a reference", RULE),
    "clipped_ratio_note": Threshold(0.1, "share of completions that reach the length limit", RULE),
    "clipped_ratio_warn": Threshold(0.3, "share of completions that reach the length limit", RULE),
    "clipped_ratio_fail": Threshold(0.95, "share of completions that reach the length limit", RULE),
    "entropy_left": Threshold(0.25, "share of the entropy at the start", "rule of thumb, after arXiv 2505.22617"),
    "entropy_early": Threshold(0.5, "share of the run before which the entropy is gone", RULE),
    "ratios_clipped_warn": Threshold(0.2, "share of tokens whose ratio is clipped", RULE),
    "worse_growth": Threshold(0.25, "share by which worse completions grow beyond what better ones do", RULE),
    "length_correlation_warn": Threshold(0.5, "correlation of reward and length within a group", RULE),
    "reward_spread_left": Threshold(0.25, "share of its spread that a reward has left", RULE),
    "reward_fall": Threshold(0.25, "standard deviations that the mean of a reward falls", RULE),
    "forecast_excess_warn": Threshold(0.1, "share of groups without signal beyond what was forecast", RULE),
    "length_growth": Threshold(0.5, "share by which completions grow", RULE),
    "held_out_share": Threshold(0.25, "share of the gain in training that held-out prompts have", RULE),
    "kl_warn": Threshold(2.0, "nats per token from the reference", RULE),
    "kl_fail": Threshold(10.0, "nats per token from the reference", RULE),
    "sampler_difference_warn": Threshold(0.02, "nats per token between sampler and trainer", RULE),
    "sampler_difference_fail": Threshold(0.1, "nats per token between sampler and trainer", RULE),
    "loss_rounding": Threshold(1e-4, "that rounding may move the loss of an evaluation", RULE),
    "repeated_warn": Threshold(0.2, "share of an answer's runs of four words that stand in it before", RULE),
    "repeated_fail": Threshold(0.5, "share of an answer's runs of four words that stand in it before", RULE),
    "no_signal_warn": Threshold(0.5, "share of groups whose rewards are all the same", RULE),
    "no_signal_fail": Threshold(0.8, "share of groups whose rewards are all the same", RULE),
}
"""Every number that a finding is held against."""


class Thresholds:
    """The thresholds, some of them replaced."""

    def __init__(self, replaced: Mapping[str, float] | None = None) -> None:
        self.replaced = dict(replaced or {})
        for name in self.replaced:
            if name not in THRESHOLDS:
                raise ConfigError(
                    f"there is no threshold {name[:80]!r}",
                    where="--threshold",
                    expected=", ".join(THRESHOLDS),
                    fix=did_you_mean(name, THRESHOLDS),
                )

    def __getitem__(self, name: str) -> float:
        return self.replaced.get(name, THRESHOLDS[name].value)

    def severity(self, value: float, names: Sequence[str]) -> Severity | None:
        """The worst severity whose threshold `value` reaches; None where it reaches none.

        names: of thresholds, each with its severity after the last underscore, as in `drift_warn`.
        """
        reached = [Severity(name.rpartition("_")[2]) for name in names if value >= self[name]]
        return min(reached, key=ORDER.index, default=None)

    def graded(
        self, id_: str, value: float, names: Sequence[str], claim: str, *, otherwise: str, **more: Any
    ) -> Finding:
        """A finding as severe as `value` makes it (see `severity`); one that has passed where it reaches no threshold.

        claim, otherwise: the sentence of the one and of the other. more: what else the first has.
        """
        severity = self.severity(value, names)
        return passed(id_, otherwise) if severity is None else Finding(id_, severity, claim, thresholds=names, **more)
