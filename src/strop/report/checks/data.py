"""The data of a run, as data.json counts it. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Iterator

from strop.report.checks.remedies import longer_rows, smoothed
from strop.report.facts import Facts
from strop.report.findings import Evidence, Finding, Remedy, Severity, passed, unchecked


def has_data(facts: Facts) -> Iterator[Finding]:
    """Without data.json nothing is known of the rows."""
    if not facts.split("train"):
        yield unchecked("rows", "the rows: data.json is missing or cannot be read")


EQUAL = ("equal_tokens", "equal_after_truncation")
"""Why a pair is dropped whose sides are the same tokens, before and after the cut."""


def same_pairs(facts: Facts) -> Iterator[Finding]:
    """A pair whose sides are the same has no gradient: strop drops it when it reads it, other programs train on it."""
    if not facts.is_pairs or not facts.split("train"):
        return
    dropped = int(sum(facts.count("train", "dropped", reason) or 0 for reason in EQUAL))
    trained, groups = facts.run.train.total("num_zero_signal_groups"), facts.run.train.total("num_groups")
    if not groups:
        yield unchecked("same-pairs", "pairs whose sides are the same: no training step is logged")
        return
    kept = facts.count("train", "num_groups") or 0
    share = max(trained / groups, dropped / (dropped + kept) if dropped else 0.0)
    yield facts.thresholds.graded(
        "same-pairs",
        share,
        ("same_pair_warn", "same_pair_fail"),
        f"In {share:.0%} of the pairs both sides are the same tokens: nothing can be learnt from them",
        otherwise=f"{share:.1%} of the pairs have the same tokens on both sides",
        evidence=Evidence.EXACT,
        numbers={"such pairs left out": dropped, "such pairs trained on": int(trained), "pairs kept": int(kept)},
        remedies=[
            longer_rows(facts, "raise the length limits, if the sides differ only behind the cut"),
            Remedy("remove such pairs from the data"),
        ],
        explains=(
            "no-end-token",
            "completions-cut",
            "duplicates",
            *(("rows-lost",) if 2 * dropped > sum(_lost(facts).values()) else ()),
            *(NOTHING_TO_LEARN if trained else ()),
        ),
    )


NOTHING_TO_LEARN = (
    "accuracy-falls",
    "gradient-zero",
    "rate-low",
    "accuracy-half",
    "weights-unmoved",
    "odds-idle",
)


def leakage(facts: Facts) -> Iterator[Finding]:
    """What is trained on says nothing about held-out rows."""
    rows, prompts = (facts.share("eval", "num_groups", "findings", name) for name in ("leaked_rows", "leaked_prompts"))
    if rows is None or prompts is None:
        if facts.split("train"):
            yield unchecked("leakage", "whether validation rows are trained on: there are none")
        return
    numbers = {"validation rows that are trained on": int(rows[0]), "with a prompt that is": int(prompts[0])}
    if rows[0] or prompts[0]:
        fail = rows[1] > 0.01 or prompts[1] >= facts.thresholds["leaked_fail"]
        what = f"{rows[1]:.0%} of the validation rows are trained on" if rows[0] else (
            f"{prompts[1]:.0%} of the validation rows have a prompt that is trained on"
        )  # fmt: skip
        yield Finding(
            "leakage",
            Severity.FAIL if fail else Severity.WARN,
            f"{what}, so the evaluation looks better than it is",
            Evidence.EXACT,
            numbers,
            harmless_if="all rows share one prompt, and differ in their answers",
            remedies=[Remedy("split by prompt: strop prepare --input FILE --output-dir DIR, then dataset.splits_dir")],
            thresholds=("leaked_fail",),
            chart="loss",
        )
    else:
        yield passed("leakage", "No validation row and none of its prompts is trained on", numbers=numbers)


def duplicates(facts: Facts) -> Iterator[Finding]:
    """Rows that stand there more than once are learnt by heart first."""
    found = facts.share("train", "num_groups", "findings", "duplicates")
    if found is None:
        return
    count, share = found
    yield facts.thresholds.graded(
        "duplicates",
        share if count >= 2 else -math.inf,  # a single one says nothing, however few the rows are
        ("duplicates_note", "duplicates_warn"),
        f"{int(count):,} training rows ({share:.1%}) stand there more than once",
        otherwise=f"{int(count):,} training rows stand there more than once",
        evidence=Evidence.EXACT,
        numbers={"rows that are there before": int(count)},
        harmless_if="they are meant to count more often",
        remedies=[Remedy("strop prepare --input FILE --output-dir DIR removes them")],
    )


def contradictions(facts: Facts) -> Iterator[Finding]:
    """Pairs in both orders, completions with both labels."""
    found = facts.share("train", "num_groups", "findings", "contradictions")
    if found is None or facts.method == "sft":
        return
    count, share = found
    flipped = min(0.4, max(0.05, round(share / 2, 2)))
    yield facts.thresholds.graded(
        "contradictions",
        share,
        ("contradictions_warn", "contradictions_fail"),
        f"{int(count):,} training rows ({share:.1%}) are contradicted by another: the same pair the other way round, "
        "or the other label",
        otherwise=f"{int(count):,} training rows are contradicted by another",
        evidence=Evidence.EXACT,
        numbers={"rows that another contradicts": int(count)},
        remedies=[Remedy("keep one of each two, or drop both"), *smoothed(facts, flipped)],
        explains=("accuracy-half", "rate-low"),
    )


def begins_twice(facts: Facts) -> Iterator[Finding]:
    """Two BOS tokens: the model has never seen that."""
    found = facts.share("train", "num_groups", "findings", "double_bos")
    if found is None:
        return
    if found[0]:
        yield Finding(
            "double-bos",
            Severity.FAIL,
            f"{int(found[0]):,} prompts ({found[1]:.0%}) begin with two BOS tokens, which the model has never seen",
            Evidence.EXACT,
            {"prompts": int(found[0])},
            remedies=[Remedy("take the BOS token out of the rows or of the chat template")],
        )
    else:
        yield passed("double-bos", "No prompt begins with two BOS tokens")


def ends(facts: Facts) -> Iterator[Finding]:
    """Without an end token the model does not learn where to stop."""
    found = facts.share("train", "num_completions", "findings", "missing_eos")
    if found is None:
        return
    count, share = found
    yield facts.thresholds.graded(
        "no-end-token",
        share,
        ("no_end_warn", "no_end_fail"),
        f"{share:.0%} of the completions have no end token, so the model does not learn where to stop",
        otherwise=f"{1 - share:.0%} of the completions end with an end token",
        evidence=Evidence.EXACT,
        numbers={"completions without an end token": int(count)},
        harmless_if="text is continued for ever on purpose",
        remedies=[
            longer_rows(facts, "raise the length limit, if they are cut"),
            Remedy("leave overlong rows out", {"dataset.filter_overlength_samples": True}),
            Remedy("check that the chat template closes a turn: strop train --dry-run shows it"),
        ],
        explains=("completions-cut",),
    )


def _lost(facts: Facts) -> dict[str, int]:
    """How many rows of the training split were refused or dropped, by reason."""
    split = facts.split("train")
    return {
        str(reason)[:200]: n
        for kind in ("refused", "dropped")
        if isinstance(split.get(kind), dict)
        for reason, n in split[kind].items()
        if isinstance(n, int)
    }


def losses(facts: Facts) -> Iterator[Finding]:
    """Rows that are read and not trained on."""
    read = facts.count("train", "rows_read")
    if not read:
        return
    reasons = _lost(facts)
    lost, most = sum(reasons.values()), sorted(reasons.items(), key=lambda item: -item[1])[:5]
    share = lost / read
    yield facts.thresholds.graded(
        "rows-lost",
        share,
        ("lost_warn", "lost_fail"),
        f"{lost:,} of {int(read):,} rows ({share:.0%}) are not trained on, most of them: {most[0][0] if most else ''}",
        otherwise=f"{lost:,} of {int(read):,} rows are refused or dropped",
        evidence=Evidence.EXACT,
        numbers=dict(most),
        remedies=[
            Remedy("look at rejected.jsonl in the run folder"),
            longer_rows(facts, "raise the length limits, if rows are dropped for them"),
        ],
    )


def cuts(facts: Facts) -> Iterator[Finding]:
    """Completions that are not whole."""
    found = facts.share("train", "num_completions", "completions_cut")
    if found is None:
        return
    count, share = found
    yield facts.thresholds.graded(
        "completions-cut",
        share,
        ("cut_warn", "cut_fail"),
        f"{share:.0%} of the completions are cut at the length limit",
        otherwise=f"{int(count):,} completions are cut at the length limit",
        evidence=Evidence.EXACT,
        numbers={"completions cut": int(count)},
        remedies=[
            longer_rows(facts, "raise the limit"),
            Remedy("leave such rows out", {"dataset.filter_overlength_samples": True}),
        ],
    )


def longer_wins(facts: Facts) -> Iterator[Finding]:
    """Where the chosen side is mostly the longer one, length is what is learnt first."""
    share, groups = facts.count("train", "findings", "length", "chosen_is_longer"), facts.count("train", "num_groups")
    if share is None or not groups or not facts.is_pairs:
        return
    means = {
        f"mean tokens, {n}": facts.count("train", "findings", "length", f"mean_{n}") or 0
        for n in ("chosen", "rejected")
    }
    chosen, rejected = means.values()
    alike = max(chosen, rejected) <= 1.1 * min(chosen, rejected)
    one_way, word = max(share, 1 - share), "longer" if share > 0.5 else "shorter"
    per_token = Remedy("compare per token", {"post_training.loss_type": "sigmoid_norm"})
    yield facts.thresholds.graded(
        "length-bias",
        one_way if groups >= 50 and not alike else -math.inf,  # few pairs, or nearly equal ones, say nothing
        ("longer_note", "longer_warn"),
        f"The chosen side is the {word} one in {one_way:.0%} of the pairs, so length is learnt, too",
        otherwise=f"The chosen side is the longer one in {share:.0%} of the pairs",
        evidence=Evidence.RULE,
        numbers={"share of pairs whose chosen side is longer": share, **means},
        harmless_if="longer answers are wanted, or better because of what makes them long",
        remedies=[Remedy("balance the pairs by length"), *([per_token] if facts.method == "dpo" else [])],
    )


CHECKS = (has_data, same_pairs, begins_twice, leakage, ends, contradictions, cuts, losses, duplicates, longer_wins)
