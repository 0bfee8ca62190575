"""Findings that can stop a run, by id. Floor 1, no torch. What each means: docs/findings.md."""

from __future__ import annotations

from typing import Literal, get_args

OfTheStart = Literal[
    "rate-zero",
    "reference-mismatch",
    "first-loss",
    "first-likelihood",
    "not-finite",
    "same-pairs",
    "double-bos",
    "leakage",
    "no-end-token",
    "contradictions",
    "completions-cut",
    "rows-lost",
    "duplicates",
    "length-bias",
    "labels",
    "simpo-beta",
    "teacher-is-student",
]
OfTheCourse = Literal[
    "gradient-zero",
    "weights-unmoved",
    "repetition",
    "worse-than-start",
    "risen",
    "gradient-spikes",
    "splits-disagree",
    "accuracy-falls",
    "rate-high",
    "likelihood-displacement",
    "drift",
    "chosen-falls",
    "rewards-together",
    "groups-without-signal",
    "completions-clipped",
    "entropy-collapse",
    "ratios-clipped",
    "worse-grow-longer",
    "longer-not-better",
    "one-reward-wins",
    "reward-hacking",
    "length-rewarded",
    "forecast-exceeded",
    "kl-high",
    "sampler-mismatch",
]
StopOn = OfTheStart | OfTheCourse
AT_ONCE = frozenset(get_args(OfTheStart))
"""Findings that are told as soon as they are seen: identities, and what is wrong with the rows."""
AT_THE_END = frozenset(
    {"ended-by-error", "rate-low", "sft-still", "odds-idle", "accuracy-half", "few-steps", "eval-size", "saturated"}
    | {"always-clipped", "kl-zero", "ratios-never-clipped"}
)
"""Findings that say something about a whole run, or are never worse than a note. They stop none."""
