"""Methods on a chosen and a rejected completion, with a reference and without. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from strop.report.checks.remedies import (
    FEWER_STEPS,
    anchored,
    higher,
    longer_run,
    longer_warmup,
    lower,
    smoothed,
    times_beta,
    weaker,
)
from strop.report.checks.start import first_loss
from strop.report.facts import LN2, Facts
from strop.report.findings import Evidence, Finding, Numbers, Remedy, Severity, passed, unchecked
from strop.report.pair_accuracy import at_first_sight, at_the_end, looks_exchanged


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
            steps=_second_half(facts),
        )
    else:
        yield passed("likelihood-displacement", f"Chosen answers: {chosen:+.2f} nats per token", numbers=numbers)


def _second_half(facts: Facts) -> tuple[float, float]:
    last = float(facts.run.last_step)
    return last / 2, last


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


def accuracy(facts: Facts) -> Iterator[Finding]:
    """Pairs are told apart; both splits agree on which way."""
    if not facts.is_pairs:
        return
    train, held = at_the_end(facts, facts.run.train), at_the_end(facts, facts.run.eval)
    if train is None:
        yield unchecked("accuracy-half", "whether pairs are told apart: no accuracy is logged")
        return
    share, low, high = train
    numbers: dict[str, float | int | str] = {
        "accuracy on training pairs": share,
        "95 % interval": f"{low:.2f} to {high:.2f}",
    }
    if held is not None:
        numbers |= {"accuracy on validation pairs": held.share, "its interval": f"{held.low:.2f} to {held.high:.2f}"}
    judged, where = (train, "training pairs") if held is None else (held, "validation pairs")
    look = Remedy(
        "read the pairs below: is the chosen side the better one? If not, exchange the two in that file, or name them "
        "the other way round (dataset.chosen_column, dataset.rejected_column)",
        reads="pairs",
    )
    common: dict[str, Any] = {"numbers": numbers, "chart": "accuracy", "steps": _second_half(facts)}
    fresh = at_first_sight(facts)
    # pairs are won only once they have been trained on: that says nothing of which side is which
    by_heart = fresh is not None and fresh.low <= 0.5 <= fresh.high < low
    lost = held is not None and held.high < 0.5 < low
    apart = held is not None and fresh is not None and looks_exchanged(fresh, held)
    if held is not None and (lost or apart) and facts.has_reference and not by_heart:
        seen = share if lost or fresh is None else fresh.share
        yield Finding(
            "splits-disagree",
            Severity.FAIL if lost else Severity.WARN,
            f"Training pairs are won (accuracy {seen:.2f}), validation pairs are lost ({held.share:.2f}): in one of "
            "the two files, chosen and rejected are exchanged" + ("" if lost else ", or the pairs are of another kind"),
            Evidence.MEASURED,
            remedies=[look],
            explains=("worse-than-start", "risen", "accuracy-half", "likelihood-displacement", "drift", "rate-high"),
            **common,
        )
    elif high < 0.5 and facts.has_reference and facts.has_trend:
        yield Finding(
            "accuracy-falls",
            Severity.FAIL,
            f"The training makes the chosen sides less likely than the rejected ones: accuracy {share:.2f}",
            Evidence.MEASURED,
            remedies=[look, lower(facts, 10)],
            **common,
        )
    elif judged.low <= 0.5 and (judged.high >= 0.5 or by_heart) and facts.has_reference:
        yield Finding(
            "accuracy-half",
            Severity.WARN if facts.has_trend and judged.high - judged.low < 0.2 else Severity.NOTE,
            f"Pairs are not told apart: accuracy {judged.share:.2f} on {where}, as by tossing a coin",
            Evidence.MEASURED,
            harmless_if="the labels are noisy and the run is short",
            remedies=[look, higher(facts, 3), *smoothed(facts, 0.1)],
            **common,
        )
    else:
        yield passed("accuracy-half", f"Accuracy on {where}: {judged.share:.2f}", numbers=numbers)


def saturated(facts: Facts) -> Iterator[Finding]:
    """All pairs are won: a shallow cue, or learnt by heart."""
    if not facts.is_pairs:
        return
    at, values = facts.run.train.series("rewards/accuracies")
    if len(values) < facts.thresholds["trend_lines"]:
        yield unchecked("saturated", f"saturation: {len(values)} logged accuracies are too few")
        return
    t = facts.thresholds
    smooth = np.convolve(values, np.ones(5) / 5, "valid")
    won = smooth >= t["saturated_at"]
    share = float(won.mean())
    if share >= t["saturated_share"]:
        begins = float(at[int(np.argmax(won)) + 4])
        early = begins < facts.run.last_step / 3
        held = at_the_end(facts, facts.run.eval)
        numbers: dict[str, float | int | str] = {"share of the run": share, "from step": begins}
        if held is not None:
            numbers["accuracy on validation pairs"] = held.share
        alike = held is not None and held.share >= t["saturated_at"] - 0.05
        yield Finding(
            "saturated",
            Severity.NOTE,
            f"Nearly all training pairs are won from step {begins:.0f} on: "
            + ("a shallow cue tells the sides apart" if early or alike else "they may be learnt by heart"),
            Evidence.RULE,
            numbers,
            harmless_if="what tells them apart is what is wanted, and held-out pairs are won as well",
            remedies=[
                Remedy("read the best pairs below: what tells the sides apart?", reads="pairs"),
                FEWER_STEPS,
                lower(facts, 3),
                *smoothed(facts, 0.1),
            ],
            thresholds=("saturated_at", "saturated_share"),
            chart="accuracy",
            steps=(begins, float(at[-1])),
        )
    else:
        yield passed("saturated", "The training pairs are not all won")


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
    numbers: dict[str, float | int | str] = {
        "loss at the start": start, "highest": peak, "at the end": end, "learning rate": facts.rate or 0.0}  # fmt: skip
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
            steps=_second_half(facts),
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
