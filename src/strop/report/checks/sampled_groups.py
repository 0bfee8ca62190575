"""Sampled completions with rewards (grpo, and pairs that are sampled): lengths, ratios, entropy. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from strop.report.checks.remedies import COSTS_LENGTH, by_algorithm, higher, lower, times_beta
from strop.report.checks.sampled_rewards import (
    length_rewarded,
    more_than_forecast,
    one_reward_wins,
    reward_hacking,
    without_signal,
)
from strop.report.facts import Facts
from strop.report.findings import Evidence, Finding, Numbers, Remedy, Severity, passed, unchecked

CLIPPED = "completions/clipped_ratio"
LENGTH = "completions/mean_length"


def completions_clipped(facts: Facts) -> Iterator[Finding]:
    """Completions that reach the length limit have no end, and mostly no answer."""
    at, shares = facts.run.train.series(CLIPPED)
    if not len(shares):
        if facts.samples:
            yield unchecked("completions-clipped", "completions that reach the length limit: no step is logged")
        return
    share, limit = float(np.median(shares)), facts.run.number("training.max_completion_length")
    is_masked = facts.run.value("post_training.mask_truncated_completions", False) is True
    nothing_left = is_masked and share >= facts.thresholds["clipped_ratio_fail"]
    left_out = ", and such completions are left out of the loss (mask_truncated_completions)" if is_masked else ""
    remedies = [Remedy("does the model know when to stop? Train it on answers that end first (method sft)")]
    if limit:
        rows = facts.run.number("training.max_seq_length")  # bounds prompt and completion together
        longer = {"training.max_completion_length": int(2 * limit)}
        longer |= {"training.max_seq_length": int(rows + limit)} if rows else {}
        remedies.insert(0, Remedy("let completions be longer", longer))
    if is_masked:
        remedies.append(Remedy("let them count", {"post_training.mask_truncated_completions": False}))
    yield facts.thresholds.graded(
        "completions-clipped",
        share,
        ("clipped_ratio_note", "clipped_ratio_warn", "clipped_ratio_fail"),
        f"{share:.0%} of the completions reach the length limit without an end token{left_out}",
        otherwise=f"{1 - share:.0%} of the completions end within the length limit",
        evidence=Evidence.RULE,
        numbers={"median share of a step": share, **({"training.max_completion_length": limit} if limit else {})},
        harmless_if="the reward asks for nothing at the end of a completion",
        remedies=remedies,
        chart="clipped",
        level=(facts.thresholds["clipped_ratio_warn"], "worth a look"),
        steps=(float(at[0]), float(at[-1])),
        explains=("gradient-zero", "weights-unmoved", "groups-without-signal") if nothing_left else (),
    )


def entropy_collapse(facts: Facts) -> Iterator[Finding]:
    """A policy that is sure of every token samples one completion again and again, and finds nothing new
    (arXiv 2505.22617)."""
    at, values = facts.run.train.series("entropy")
    before, after = facts.first("entropy"), facts.last("entropy")
    if before is None or after is None or len(values) < facts.thresholds["trend_lines"]:
        if facts.samples:
            yield unchecked("entropy-collapse", f"the course of the entropy: {len(values)} logged steps are too few")
        return
    t, left = facts.thresholds, after / max(before, 1e-9)
    numbers: Numbers = {"nats per token at the start": before, "at the end": after}
    if left >= t["entropy_left"]:
        yield passed("entropy-collapse", f"The entropy keeps {left:.0%} of what it was at the start", numbers=numbers)
        return
    low_from = float(at[int(np.argmax(values < t["entropy_left"] * before))])
    is_early = low_from < t["entropy_early"] * facts.num_steps
    yield Finding(
        "entropy-collapse",
        Severity.WARN if is_early else Severity.NOTE,
        f"The entropy fell from {before:.3g} to {after:.3g} nats per token, below {t['entropy_left']:.0%} of its start "
        f"at step {low_from:.0f} of {facts.num_steps}: completions of a prompt become alike",
        Evidence.RULE,
        numbers,
        harmless_if="the prompts are solved by now",
        remedies=[lower(facts, 2), *_clip_higher(facts), _entropy_bonus(facts), Remedy("use harder prompts")],
        thresholds=("entropy_left", "entropy_early"),
        chart="entropy",
        level=(t["entropy_left"] * before, f"{t['entropy_left']:.0%} of the start"),
        steps=(low_from, float(at[-1])),
        explains=("groups-without-signal", "forecast-exceeded"),
    )


def _entropy_bonus(facts: Facts) -> Remedy:
    """A term of the loss, where the method has it, or twice as much of it."""
    weight = facts.run.number("post_training.entropy_coef") or 0.0
    return Remedy("add an entropy bonus", {"post_training.entropy_coef": 2 * weight or 0.001})


def _clip_higher(facts: Facts) -> list[Remedy]:
    """DAPO's upper bound (arXiv 2503.14476), which lets unlikely tokens become likelier."""
    high = facts.run.number("post_training.epsilon_high")
    if high is None or high >= 0.28 or facts.run.value("post_training.gate") not in (None, "clip"):
        return []
    return [Remedy("clip ratios above later, as DAPO does", {"post_training.epsilon_high": 0.28})]


def ratios_clipped(facts: Facts) -> Iterator[Finding]:
    """Ratios far from 1: what was sampled is of a policy that is no more."""
    at, shares = facts.run.train.series("clip_ratio/region_mean")
    by_token = facts.run.value("post_training.importance_sampling_level") in (None, "token")
    if not len(shares) or not by_token:  # bounds of ratios of whole completions are narrow, and many are outside
        return
    share = float(facts.end(shares, facts.run.train).mean())
    rounds = _rounds(facts)
    fewer = [Remedy("use what was sampled once", {"rollout.num_iterations": 1})] if rounds[0] > 1 else []
    fewer += [Remedy("sample before every step", {"rollout.steps_per_generation": 1})] if rounds[1] > 1 else []
    if facts.run.number("rollout.staleness"):
        fewer.append(Remedy("wait for what the current weights sample", {"rollout.staleness": 0}))
    yield facts.thresholds.graded(
        "ratios-clipped",
        share,
        ("ratios_clipped_warn",),
        f"At the end the ratio of {share:.0%} of the tokens is clipped: the policy is far from the one that sampled",
        otherwise=f"At the end the ratio of {share:.1%} of the tokens is clipped",
        evidence=Evidence.RULE,
        numbers={"share of tokens clipped": share, "updates per sampling": rounds[0] * rounds[1]},
        harmless_if="rows that another policy sampled are trained on knowingly",
        remedies=[*fewer, lower(facts, 2)],
        chart="ratios",
        level=(facts.thresholds["ratios_clipped_warn"], "worth a look"),
        steps=(float(at[0]), float(at[-1])),
    )


def _rounds(facts: Facts) -> tuple[float, float]:
    """How many times what was sampled is trained on, and how many steps train on one sampling."""
    iterations, steps = (
        facts.run.number(f"rollout.{name}") or 1 for name in ("num_iterations", "steps_per_generation")
    )
    return iterations, steps


def ratios_never_clipped(facts: Facts) -> Iterator[Finding]:
    """Between updates on the same samples the policy moves, so some ratio leaves its bounds at some time."""
    at, shares = facts.run.train.series("clip_ratio/region_mean")
    updates = math.prod(_rounds(facts))
    if updates <= 1 or len(shares) < facts.thresholds["trend_lines"]:
        return
    if shares.any():
        words = "Some ratios are clipped: the policy moves between the updates of a sampling"
        yield passed("ratios-never-clipped", words)
        return
    yield Finding(
        "ratios-never-clipped",
        Severity.NOTE,
        f"No ratio was ever clipped, at {updates:g} updates per sampling: the policy hardly moves between them",
        Evidence.MEASURED,
        {"highest share of tokens clipped": 0.0, "updates per sampling": updates, "logged steps": len(shares)},
        harmless_if="the reward rises all the same",
        remedies=[higher(facts, 3)],
        thresholds=("trend_lines",),
        chart="ratios",
        steps=(float(at[0]), float(at[-1])),
    )


def worse_grow_longer(facts: Facts) -> Iterator[Finding]:
    """A mean over each completion costs a long wrong one less per token than a short one, so wrong ones grow
    (arXiv 2503.20783)."""
    t, (better, worse) = facts.thresholds, (f"{LENGTH}_better", f"{LENGTH}_worse")
    at, lengths = facts.run.train.series(worse)
    ends = [(facts.first(name), facts.last(name)) for name in (better, worse)]
    if len(lengths) < t["trend_lines"] or not all(before and after for before, after in ends):
        if facts.samples:
            why = f"{len(lengths)} logged steps have lengths of both are too few"
            yield unchecked("worse-grow-longer", f"whether completions with low rewards grow more than others: {why}")
        return
    (better_before, better_after), (worse_before, worse_after) = [(a or 0.0, b or 0.0) for a, b in ends]
    growth, other = worse_after / worse_before - 1, better_after / better_before - 1
    noise = sum(facts.noise(name) / before for name, before in ((better, better_before), (worse, worse_before)))
    numbers: Numbers = {
        "tokens of worse ones at the start": worse_before,
        "worse ones at the end": worse_after,
        "better ones at the start": better_before,
        "better ones at the end": better_after,
    }
    words = (
        f"Completions with a reward below the mean of their group grew by {growth:+.0%}, those above by {other:+.0%}"
    )
    if min(growth, growth - other) < max(t["worse_growth"], noise) or worse_after <= better_after:
        yield passed("worse-grow-longer", words, numbers=numbers)
        return
    yield Finding(
        "worse-grow-longer",
        Severity.WARN,
        f"{words}: wrong answers become long",
        Evidence.RULE,
        numbers,
        harmless_if="hard prompts need long answers, and the reward rises",
        remedies=[
            by_algorithm(facts, "divide by a length that is the same for all", "dr_grpo"),
            by_algorithm(facts, "count every token alike", "dapo"),
            COSTS_LENGTH,
        ],
        thresholds=("worse_growth",),
        chart="lengths",
        steps=(float(at[0]), float(at[-1])),
        explains=("longer-not-better",),
    )


def longer_not_better(facts: Facts) -> Iterator[Finding]:
    """Completions that grow without a gain on held-out prompts: length itself is rewarded."""
    at, _ = facts.run.train.series(LENGTH)
    before, after = facts.first(LENGTH), facts.last(LENGTH)
    if not facts.samples or before is None or after is None:
        return
    t, growth = facts.thresholds, after / max(before, 1e-9) - 1
    numbers: Numbers = {"tokens at the start": before, "tokens at the end": after}
    if growth < t["length_growth"]:
        words = f"Completions have {after:.0f} tokens at the end, {before:.0f} at the start"
        yield passed("longer-not-better", words, numbers=numbers)
        return
    gain, cut = facts.held_out_gain, facts.last(CLIPPED) or 0.0
    if gain is None and cut < t["clipped_ratio_note"]:
        why = "the reward is not measured on held-out prompts twice"
        yield unchecked("longer-not-better", f"whether longer completions ({growth:+.0%}) are better: {why}")
        return
    if gain is not None and gain[0] > gain[1] and cut < t["clipped_ratio_warn"]:
        words = f"Completions grew by {growth:.0%}, and the held-out reward by {gain[0]:+.3g}"
        yield passed("longer-not-better", words, numbers=numbers)
        return
    flat = gain is not None and gain[0] <= gain[1]
    why = "the held-out reward did not rise" if flat else f"{cut:.0%} of them reach the length limit"
    if gain is not None:
        numbers = {**numbers, "change of the held-out reward": f"{gain[0]:+.3g} ± {gain[1]:.2g} (95 %)"}
    yield Finding(
        "longer-not-better",
        Severity.WARN,
        f"Completions grew by {growth:.0%}, from {before:.0f} to {after:.0f} tokens, while {why}",
        Evidence.RULE,
        numbers,
        harmless_if="longer completions are wanted",
        remedies=[
            Remedy("read rollouts.jsonl: which reward grows with the length?"),
            COSTS_LENGTH,
            by_algorithm(facts, "divide by a length that is the same for all", "dr_grpo"),
        ],
        thresholds=("length_growth", "clipped_ratio_note"),
        chart="lengths",
        steps=(float(at[0]), float(at[-1])),
        explains=("reward-hacking", "worse-than-start", "length-rewarded"),
    )


def divergence(facts: Facts) -> Iterator[Finding]:
    """How far the policy is from its reference, where the loss has that as a term."""
    at, _ = facts.run.train.series("kl")
    found = facts.last("kl")
    if found is None:
        return
    yield facts.thresholds.graded(
        "kl-high",
        found,
        ("kl_warn", "kl_fail"),
        f"The policy is {found:.3g} nats per token from its reference: text may fall apart",
        otherwise=f"The policy is {found:.3g} nats per token from its reference",
        evidence=Evidence.RULE,
        numbers={"nats per token at the end": found},
        harmless_if="another format is meant to be learnt, and what it writes is good",
        remedies=[lower(facts, 3), *times_beta(facts, 3, "raise beta threefold")],
        chart="kl",
        level=(facts.thresholds["kl_warn"], "worth a look"),
        steps=(float(at[0]), float(at[-1])),
    )


def sampler_mismatch(facts: Facts) -> Iterator[Finding]:
    """Sampler and trainer compute the same log-probs in two ways; a small difference can end a training
    (arXiv 2605.14220)."""
    at, _ = facts.run.train.series("sampling/sampling_logp_difference/mean")
    found = facts.last("sampling/sampling_logp_difference/mean")
    if found is None:
        if facts.samples:
            why = "they are compared with post_training.sampler_correction only"
            yield unchecked("sampler-mismatch", f"whether sampler and trainer have the same log-probs: {why}")
        return
    ratio = facts.last("sampling/importance_sampling_ratio/mean")
    yield facts.thresholds.graded(
        "sampler-mismatch",
        found,
        ("sampler_difference_warn", "sampler_difference_fail"),
        f"Log-probs of sampler and trainer differ by {found:.3g} nats per token: they are not the same model",
        otherwise=f"Log-probs of sampler and trainer differ by {found:.2g} nats per token",
        evidence=Evidence.RULE,
        numbers={"nats per token": found, **({} if ratio is None else {"mean of old / sampler": ratio})},
        harmless_if="rows that another policy sampled are trained on knowingly",
        remedies=[
            Remedy("compute in one precision everywhere: are weights or kernels of the sampler others?"),
            Remedy("cut off what differs most", {"post_training.sampler_correction": "token_truncate"}),
        ],
        chart="sampler",
        level=(facts.thresholds["sampler_difference_warn"], "worth a look"),
        steps=(float(at[0]), float(at[-1])),
    )


ALL = (
    completions_clipped,
    sampler_mismatch,
    divergence,
    worse_grow_longer,
    longer_not_better,
    one_reward_wins,
    reward_hacking,
    length_rewarded,
    entropy_collapse,
    ratios_clipped,
    ratios_never_clipped,
    more_than_forecast,
    without_signal,
)
"""In the order in which findings of one severity are listed: what is behind the others first."""


def of_groups(facts: Facts) -> Iterator[Finding]:
    """Everything about groups, for runs that train on rewards: those of grpo, and pairs that are sampled."""
    if facts.trains_on_rewards:
        for check in ALL:
            yield from check(facts)


CHECKS = (of_groups,)
