"""Whether pairs are told apart: by training and by validation rows, and not by a shallow cue. Floor 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from strop.report.checks.remedies import fewer_steps, higher, lower, smoothed
from strop.report.facts import Facts
from strop.report.findings import Evidence, Finding, Remedy, Severity, passed, unchecked
from strop.report.pair_accuracy import Accuracy, at_first_sight, at_the_end, looks_exchanged


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
    common: dict[str, Any] = {"numbers": numbers, "chart": "accuracy", "steps": facts.second_half}
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
        yield _not_told_apart(facts, train, held, where, look, common)
    else:
        yield passed("accuracy-half", f"Accuracy on {where}: {judged.share:.2f}", numbers=numbers)


def _not_told_apart(
    facts: Facts, train: Accuracy, held: Accuracy | None, where: str, look: Remedy, common: Mapping[str, Any]
) -> Finding:
    """An accuracy as by tossing a coin: on validation pairs, where there are some. Training pairs may be won all the
    same, and then more training does not help."""
    judged = train if held is None else held
    if held is not None and train.low > 0.5:
        claim = (
            f"What training pairs teach (accuracy {train.share:.2f}) does not hold for validation pairs "
            f"({held.share:.2f}, as by tossing a coin): they are learnt by heart"
        )
        labels = Remedy("read the pairs below: is the chosen side the better one, in most of them?", reads="pairs")
        harmless_if, remedies = "the validation pairs are of another kind", [labels, fewer_steps(facts)]
    else:
        claim = f"Pairs are not told apart: accuracy {judged.share:.2f} on {where}, as by tossing a coin"
        harmless_if, remedies = "the labels are noisy and the run is short", [look, higher(facts, 3)]
    return Finding(
        "accuracy-half",
        Severity.WARN if facts.has_trend and judged.high - judged.low < 0.2 else Severity.NOTE,
        claim,
        Evidence.MEASURED,
        harmless_if=harmless_if,
        remedies=[*remedies, *smoothed(facts, 0.1)],
        **common,
    )


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
                fewer_steps(facts),
                lower(facts, 3),
                *smoothed(facts, 0.1),
            ],
            thresholds=("saturated_at", "saturated_share"),
            chart="accuracy",
            steps=(begins, float(at[-1])),
        )
    else:
        yield passed("saturated", "The training pairs are not all won")
