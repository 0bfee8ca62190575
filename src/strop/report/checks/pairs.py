"""Methods on a chosen and a rejected completion, with a reference and without. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from strop.report.checks.accuracy import accuracy, saturated
from strop.report.checks.remedies import (
    anchored,
    higher,
    longer_run,
    longer_warmup,
    lower,
    times_beta,
    weaker,
)
from strop.report.checks.start import first_loss
from strop.report.facts import LN2, Facts
from strop.report.findings import Evidence, Finding, Numbers, Remedy, Severity, passed, unchecked


def likelihood_displacement(facts: Facts) -> Iterator[Finding]:
    """The margin grows while chosen completions become less likely, too (arXiv 2402.13228, 2410.08847)."""
    if not facts.is_pairs or not facts.has_reference:
        return
    chosen, rejected = facts.logp_gain("chosen"), facts.logp_gain("rejected")
    if chosen is None or rejected is None:
        yield unchecked("likelihood-displacement", "whether chosen answers stay as likely: no rewards are logged")
        return
    t = facts.thresholds
    numbers: Numbers = {
        "chosen, nats per token": chosen,
        "rejected, nats per token": rejected,
        "measured on": facts.watched_words,
    }
    lost = -chosen
    if lost >= t["displaced_note"] and chosen > rejected:
        half = lost > 0.5 * -rejected and lost >= t["displaced_warn"]
        severity = Severity.NOTE
        if facts.has_trend and lost >= t["displaced_warn"]:
            severity = Severity.FAIL if lost >= t["displaced_fail"] and half else Severity.WARN
        yield Finding(
            "likelihood-displacement",
            severity,
            f"Chosen answers became less likely ({chosen:+.2f} nats per token); the margin grew only because rejected "
            f"answers fell faster ({rejected:+.2f})",
            Evidence.RULE,
            numbers,
            harmless_if="the model was trained on the chosen answers before, so they can only fall, and what it "
            "generates is still good",
            remedies=[*anchored(facts), *weaker(facts), Remedy("remove pairs whose sides are nearly the same")],
            thresholds=("displaced_note", "displaced_warn", "displaced_fail"),
            chart="rewards",
            level=(-t["displaced_warn"], "worth a look: chosen below"),
            steps=facts.second_half,
        )
    else:
        yield passed("likelihood-displacement", f"Chosen answers: {chosen:+.2f} nats per token", numbers=numbers)


def drift(facts: Facts) -> Iterator[Finding]:
    """How far the policy has gone from its reference, per token: far enough, and it writes nonsense."""
    if not facts.has_reference:
        return
    gains = {side: facts.logp_gain(side) for side in ("chosen", "rejected")}
    known = {side: gain for side, gain in gains.items() if gain is not None}
    if not known:
        yield unchecked("drift", "how far the policy is from its reference: no rewards are logged")
        return
    worst = max(known.values(), key=abs)
    numbers: dict[str, float | int | str] = {f"{side}, nats per token": gain for side, gain in known.items()}
    levels = ("drift_note", "drift_warn", "drift_fail")
    severity = facts.thresholds.severity(abs(worst), levels)
    if severity is not None:
        yield Finding(
            "drift",
            severity,
            f"The policy is far from its reference: {abs(worst):.2f} nats per token on {facts.watched_words}",
            Evidence.RULE,
            numbers,
            harmless_if="a new format or language is to be learnt, and what it generates is good",
            remedies=weaker(facts),
            thresholds=levels,
            chart="rewards",
            level=(math.copysign(facts.thresholds[f"drift_{severity}"], worst), "far beyond here"),
            explains=("likelihood-displacement",) if severity is Severity.FAIL else (),
        )
    else:
        yield passed("drift", f"Policy and reference are {abs(worst):.2f} nats per token apart", numbers=numbers)


def _last_margins(facts: Facts) -> np.ndarray | None:
    """The margins of the last fifth of the steps."""
    margins = facts.run.margins
    if not margins.values:
        return None
    kept = [v for s, v in zip(margins.steps, margins.values, strict=True) if s > 0.8 * margins.steps[-1]]
    found = np.concatenate(kept or list(margins.values[-1:]))
    return found if len(found) else None


def learnt_too_little(facts: Facts) -> Iterator[Finding]:
    """The sides of a pair are as far apart at the end as at the beginning."""
    if not facts.is_pairs or not facts.has_reference:
        return
    margins, mean = _last_margins(facts), facts.raw_margin
    size = float(np.median(np.abs(margins))) if margins is not None else None if mean is None else abs(mean)
    if size is None:
        yield unchecked("rate-low", "whether anything is learnt: no margins are logged")
        return
    t = facts.thresholds
    loss = facts.last(facts.loss_name(facts.run.train))
    numbers: Numbers = {
        "median distance of the sides, nats": size,
        "learning rate": facts.rate or 0.0,
        "steps": facts.run.last_step,
    }
    if size < t["stuck_margin"]:
        near = f", the loss stays at {loss:.4f}" if loss is not None else ""
        yield Finding(
            "rate-low",
            Severity.WARN if facts.run.last_step >= t["trend_lines"] else Severity.NOTE,
            f"Hardly anything is learnt: the sides of a pair are {size:.2g} nats apart at the end{near}",
            Evidence.RULE,
            numbers,
            harmless_if="the run is a trial of a few steps",
            remedies=[higher(facts, 10 if facts.is_adapted else 3), longer_run(facts)],
            thresholds=("stuck_margin",),
            chart="loss",
            explains=("accuracy-half",),
        )
    elif facts.beta and loss is not None and mean is not None and abs(loss - LN2) < t["stuck_loss"] and abs(mean) > 1:
        yield Finding(
            "rate-low",
            Severity.NOTE,
            f"The loss looks flat at {loss:.4f} since beta is small ({facts.beta:g}): the margin has grown to "
            f"{mean:.2g} nats",
            Evidence.EXACT,
            {**numbers, "margin, nats": mean},
            harmless_if="beta is meant to be so small",
            remedies=[Remedy("raise beta", {"post_training.beta": 0.1})],
            thresholds=("stuck_loss",),
            chart="margins",
        )
    else:
        yield passed("rate-low", f"The sides of a pair are {size:.2g} nats apart at the end", numbers=numbers)


FOLLOW_A_HIGH_RATE = (
    "drift",
    "likelihood-displacement",
    "worse-than-start",
    "risen",
    "accuracy-half",
    "accuracy-falls",
    "always-clipped",
    "gradient-spikes",
    "chosen-falls",
    "repetition",
)


def rate_high(facts: Facts) -> Iterator[Finding]:
    """The loss rises above its start: the steps are too long."""
    if not facts.is_pairs:
        return
    name = facts.loss_name(facts.run.train)
    at, losses = facts.run.train.series(name)
    if len(losses) < 5:
        yield unchecked("rate-high", f"whether the learning rate is too high: {len(losses)} logged losses are too few")
        return
    known = first_loss(facts) if facts.starts_at_reference else None
    start, end = float(losses[0]) if known is None else known, facts.last(name)
    assert end is not None
    width = max(1, len(losses) // 10)
    smooth = np.array([np.median(losses[i : i + width]) for i in range(0, len(losses), width)])
    peak = float(smooth.max())
    scale = max(abs(start), LN2) / LN2
    over = f", median of {width} logged steps" if width > 1 else ""
    numbers: Numbers = {
        "loss at the start": start,
        f"highest{over}": peak,
        "median at the end": end,
        "learning rate": facts.rate or 0.0,
    }
    if peak > start + facts.thresholds["rate_high_loss"] * scale:
        still = end > start
        worst = int(smooth.argmax()) * width
        yield Finding(
            "rate-high",
            Severity.FAIL if still else Severity.WARN,
            f"The loss rises above its start, from {start:.3g} to {peak:.3g}: the learning rate is too high",
            Evidence.RULE,
            numbers,
            remedies=[lower(facts, 10), longer_warmup(0.2)],
            thresholds=("rate_high_loss",),
            chart="loss",
            level=(start, "at the start"),
            steps=(float(at[worst]), float(at[min(worst + width, len(at) - 1)])),
            explains=FOLLOW_A_HIGH_RATE,
        )
    else:
        yield passed("rate-high", "The training loss stays below its start", numbers=numbers)


def chosen_falls(facts: Facts) -> Iterator[Finding]:
    """Without a reference nothing holds the chosen side but the loss itself."""
    if not facts.is_pairs or facts.has_reference:
        return
    gain = facts.logp_gain("chosen")
    if gain is None:
        yield unchecked("chosen-falls", "whether chosen answers stay as likely: no log-probs are logged")
        return
    t = facts.thresholds
    numbers: Numbers = {"chosen, nats per token": gain, "measured on": facts.watched_words}
    softer = times_beta(facts, 0.5, "halve beta") if facts.method in ("orpo", "cpo") else []
    if -gain >= t["falls_warn"]:
        yield Finding(
            "chosen-falls",
            Severity.FAIL if -gain >= t["falls_fail"] and facts.has_trend else Severity.WARN,
            f"Chosen answers became less likely ({gain:+.2f} nats per token), and there is no reference to hold them",
            Evidence.RULE,
            numbers,
            remedies=[*anchored(facts), lower(facts, 3), *softer],
            thresholds=("falls_warn", "falls_fail"),
            chart="likelihood",
            steps=facts.second_half,
        )
    else:
        yield passed("chosen-falls", f"Chosen answers: {gain:+.2f} nats per token", numbers=numbers)


def odds_idle(facts: Facts) -> Iterator[Finding]:
    """Without a reference the start ranks pairs already; what counts is the rise."""
    if not facts.is_pairs or facts.has_reference:
        return
    before, after = facts.first("rewards/margins", facts.watched), facts.last("rewards/margins", facts.watched)
    if before is None or after is None:
        yield unchecked("odds-idle", "whether the preference is learnt: no margins are logged")
        return
    numbers: Numbers = {"margin at the start": before, "margin at the end": after, "measured on": facts.watched_words}
    more_weight = times_beta(facts, 3, "give the preference more weight") if facts.method == "orpo" else []
    if after <= before and facts.run.last_step >= facts.thresholds["trend_lines"]:
        yield Finding(
            "odds-idle",
            Severity.WARN,
            f"The preference is not learnt: the margin was {before:.3g} at the start and is {after:.3g} now",
            Evidence.MEASURED,
            numbers,
            harmless_if="the model first has to learn to answer at all",
            remedies=[
                *more_weight,
                higher(facts, 3),
                Remedy("train the chosen answers first, then the preference: method sft, then dpo"),
            ],
            chart="margins",
        )
    else:
        yield passed("odds-idle", f"The margin grew from {before:.3g} to {after:.3g}", numbers=numbers)


def simpo_settings(facts: Facts) -> Iterator[Finding]:
    """The beta of dpo in a configuration of simpo trains next to nothing."""
    if facts.method != "simpo" or facts.beta is None:
        return
    if facts.beta < 1:
        yield Finding(
            "simpo-beta",
            Severity.WARN,
            f"simpo_beta is {facts.beta:g}, as for dpo: it scales a margin per token here, and 2 to 10 is usual",
            Evidence.MEASURED,
            {"post_training.simpo_beta": facts.beta},
            remedies=[Remedy("take the usual value", {"post_training.simpo_beta": 2.0})],
        )
    else:
        yield passed("simpo-beta", f"simpo_beta is {facts.beta:g}")


CHECKS = (
    accuracy,
    rate_high,
    likelihood_displacement,
    drift,
    chosen_falls,
    odds_idle,
    learnt_too_little,
    saturated,
    simpo_settings,
)
