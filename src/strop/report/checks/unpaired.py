"""Labelled completions (kto) and demonstrations (sft). Floor 2."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from strop.report.checks.remedies import higher, longer_warmup, lower, weaker
from strop.report.facts import Facts
from strop.report.findings import Evidence, Finding, Numbers, Remedy, Severity, passed, unchecked


def clamped(facts: Facts) -> Iterator[Finding]:
    """The estimate of the divergence is 0 where unrelated text became less likely."""
    if facts.method != "kto" or facts.run.value("post_training.kto_loss", "kto") != "kto":
        return
    at, kl = facts.run.train.series("kl")
    if len(kl) < facts.thresholds["trend_lines"]:
        yield unchecked("kl-zero", f"the divergence from the reference: {len(kl)} logged steps are too few")
        return
    late = kl[len(kl) // 5 :]
    share, raw = float((late == 0).mean()), facts.last("kl_unclamped")
    numbers: dict[str, float | int | str] = {"share of steps at 0": share}
    if raw is not None:
        numbers["before it is clamped, at the end"] = raw
    if share >= facts.thresholds["kl_zero"]:
        yield Finding(
            "kl-zero",
            Severity.NOTE,
            f"The divergence from the reference (z0) is clamped to 0 in {share:.0%} of the steps: other text becomes "
            "less likely",
            Evidence.RULE,
            numbers,
            harmless_if="the rate is small, or the run is at its beginning",
            remedies=weaker(facts),
            thresholds=("kl_zero",),
            chart="kl",
            steps=(float(at[len(kl) // 5]), float(at[-1])),
        )
    else:
        yield passed("kl-zero", f"The divergence (z0) is clamped to 0 in {share:.0%} of the steps", numbers=numbers)


def labels(facts: Facts) -> Iterator[Finding]:
    """Desirable and undesirable completions should weigh alike (arXiv 2402.01306)."""
    if facts.method != "kto":
        return
    good, bad = (facts.count("train", "findings", name) for name in ("desirable", "undesirable"))
    weights = [facts.run.number(f"post_training.{name}_weight") for name in ("desirable", "undesirable")]
    if good is None or bad is None or None in weights:
        yield unchecked("labels", "how many completions are desirable: data.json does not say")
        return
    w_good, w_bad = float(weights[0] or 0), float(weights[1] or 0)
    numbers: Numbers = {"desirable": int(good), "undesirable": int(bad)}
    if not good or not bad:
        yield Finding(
            "labels",
            Severity.FAIL,
            f"All {int(good + bad):,} completions have one label, so nothing says what sets the others apart",
            Evidence.EXACT,
            numbers,
            remedies=[Remedy("add rows of the other label")],
        )
        return
    ratio, most = w_good * good / (w_bad * bad), facts.thresholds["labels_ratio"]
    if not 1 <= ratio <= most:
        wanted = float(f"{w_good * good / (bad * (1 + most) / 2):.3g}")
        yield Finding(
            "labels",
            Severity.NOTE if 0.5 <= ratio <= 2 * most else Severity.WARN,
            f"Desirable and undesirable completions count {ratio:.2f} : 1; 1 : 1 to {most:.2f} : 1 is advised",
            Evidence.MEASURED,
            numbers,
            harmless_if="one side is meant to count more",
            remedies=[Remedy("weigh them alike", {"post_training.undesirable_weight": wanted})],
            thresholds=("labels_ratio",),
        )
    else:
        yield passed("labels", f"Desirable and undesirable completions count {ratio:.2f} : 1", numbers=numbers)


def rewards_together(facts: Facts) -> Iterator[Finding]:
    """Desirable completions should become likelier against the undesirable ones."""
    if facts.method != "kto":
        return
    good, bad = facts.logp_gain("chosen"), facts.logp_gain("rejected")
    if good is None or bad is None:
        yield unchecked("rewards-together", "whether the labels are told apart: there are no rewards of both")
        return
    t = facts.thresholds
    numbers: Numbers = {
        "desirable, nats per token": good,
        "undesirable, nats per token": bad,
        "measured on": facts.watched_words,
    }
    if good <= bad and facts.has_trend:
        yield Finding(
            "rewards-together",
            Severity.FAIL if bad - good > t["displaced_note"] else Severity.WARN,
            f"Desirable answers gain no more than undesirable ones: {good:+.2f} and {bad:+.2f} nats per token",
            Evidence.MEASURED,
            numbers,
            harmless_if="the run is short",
            remedies=[Remedy("read some rows: is label true where the answer is good?"), higher(facts, 3)],
            chart="rewards",
            explains=("worse-than-start",),
        )
    elif -good >= t["displaced_warn"]:
        yield Finding(
            "rewards-together",
            Severity.WARN,
            f"Desirable answers became less likely, too ({good:+.2f} nats per token; undesirable ones {bad:+.2f})",
            Evidence.RULE,
            numbers,
            harmless_if="what it generates is still good",
            remedies=weaker(facts),
            thresholds=("displaced_warn",),
            chart="rewards",
        )
    else:
        words = f"Desirable answers: {good:+.2f} nats per token; undesirable ones: {bad:+.2f}"
        yield passed("rewards-together", words, numbers=numbers)


def imitation(facts: Facts) -> Iterator[Finding]:
    """Whether demonstrations are learnt: neither too little nor with too long steps."""
    if facts.method != "sft":
        return
    at, values = facts.run.train.series("loss")
    if len(values) < 5:
        yield unchecked("sft-still", f"whether the loss falls: {len(values)} logged losses are too few")
        return
    before, after = facts.first("loss"), facts.last("loss")
    assert before is not None and after is not None
    t = facts.thresholds
    numbers: Numbers = {"loss at the start": before, "loss at the end": after, "learning rate": facts.rate or 0.0}
    size = max(abs(before), 1e-9)
    peak = float(np.median(values[: max(5, len(values) // 4)]).max())
    rises = after - before > max(0.02 * before, facts.noise("loss"))
    if rises or peak > before * 1.5 + 0.5:
        yield Finding(
            "rate-high",
            Severity.FAIL if rises and facts.has_trend else Severity.WARN,
            f"The training loss rises, from {before:.3g} to {max(after, peak):.3g}: the learning rate is too high",
            Evidence.RULE,
            numbers,
            remedies=[lower(facts, 10), longer_warmup(0.1)],
            chart="loss",
            steps=(float(at[0]), float(at[-1])),
            explains=("worse-than-start", "risen", "always-clipped", "gradient-spikes", "repetition"),
        )
    elif (before - after) / size < t["sft_still"] and facts.has_trend:
        yield Finding(
            "sft-still",
            Severity.WARN,
            f"The training loss hardly falls: {before:.4g} at the start, {after:.4g} at the end",
            Evidence.RULE,
            numbers,
            harmless_if="the model knows these answers already",
            remedies=[higher(facts, 10 if facts.is_adapted else 3)],
            thresholds=("sft_still",),
            chart="loss",
        )
    else:
        yield passed("sft-still", f"The training loss falls from {before:.4g} to {after:.4g}", numbers=numbers)


CHECKS = (labels, rewards_together, imitation, clamped)
