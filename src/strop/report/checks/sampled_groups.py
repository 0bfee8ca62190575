"""Groups with rewards (grpo, and pairs that are sampled). Floor 2."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from strop.readable import is_number
from strop.report.checks.remedies import lower, times_beta
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
        remedies.insert(0, Remedy("let completions be longer", {"training.max_completion_length": int(2 * limit)}))
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


def without_signal(facts: Facts) -> Iterator[Finding]:
    """A group whose completions all have the same reward has advantages of 0, or no pair, and teaches nothing."""
    at, shares = facts.run.train.series("frac_reward_zero_std")
    if not len(shares):
        yield unchecked("groups-without-signal", "groups whose rewards are all the same: no training step is logged")
        return
    share = float(shares.mean())
    yield facts.thresholds.graded(
        "groups-without-signal",
        share,
        ("no_signal_fail", "no_signal_warn"),
        f"In {share:.0%} of the groups all completions have the same reward, so they teach nothing{_forecast(facts)}",
        otherwise=f"In {1 - share:.0%} of the groups the rewards differ{_forecast(facts)}",
        evidence=Evidence.MEASURED,
        numbers={"share of groups without signal": share, "logged steps": len(shares)},
        harmless_if="the prompts are solved by now",
        remedies=[
            Remedy("look at rollouts.jsonl: are the prompts too hard or too easy, or do the rewards never apply?"),
            Remedy("sample more completions per prompt", {"rollout.num_generations": _more(facts)}),
            Remedy("leave such groups out and draw further prompts", {"rollout.dynamic_sampling": True}),
        ],
        chart="signal",
        level=(facts.thresholds["no_signal_warn"], "worth a look"),
        steps=(float(at[0]), float(at[-1])),
        explains=("gradient-zero", "weights-unmoved"),
    )


def _forecast(facts: Facts) -> str:
    """What was forecast before the first step, as the end of a sentence; nothing where nothing was."""
    found = facts.run.forecast
    numbers = [found.get(name) for name in ("without_signal", "low", "high", "num_prompts")]
    if not all(is_number(x) and 0 <= x < 1e9 for x in numbers):
        return ""
    share, low, high, count = (float(x or 0) for x in numbers)
    return (
        f"; at the start, {share:.0%} were forecast to have the same reward throughout (95 %: {low:.0%} to {high:.0%}, "
        f"from {count:.0f} prompts)"
    )


def _more(facts: Facts) -> int:
    return 2 * int(facts.run.number("rollout.num_generations") or 8)


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
        remedies=[lower(facts, 2), *_clip_higher(facts), Remedy("use prompts that are harder for this model")],
        thresholds=("entropy_left", "entropy_early"),
        chart="entropy",
        level=(t["entropy_left"] * before, f"{t['entropy_left']:.0%} of the start"),
        steps=(low_from, float(at[-1])),
        explains=("groups-without-signal",),
    )


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
    rounds = [facts.run.number(f"rollout.{name}") or 1 for name in ("num_iterations", "steps_per_generation")]
    fewer = [Remedy("use what was sampled once", {"rollout.num_iterations": 1})] if rounds[0] > 1 else []
    fewer += [Remedy("sample before every step", {"rollout.steps_per_generation": 1})] if rounds[1] > 1 else []
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
            Remedy("add the reward length, which costs those that come near the limit"),
            Remedy("divide by a length that is the same for all", {"post_training.algorithm": "dr_grpo"}),
        ],
        thresholds=("length_growth", "clipped_ratio_note"),
        chart="lengths",
        steps=(float(at[0]), float(at[-1])),
        explains=("reward-hacking", "worse-than-start"),
    )


def reward_hacking(facts: Facts) -> Iterator[Finding]:
    """The reward rises where it trains, and not where it does not."""
    at, rewards = facts.run.train.series("reward")
    before, after = facts.first("reward"), facts.last("reward")
    if not facts.samples or before is None or after is None:
        return
    gain = facts.held_out_gain
    if gain is None or len(rewards) < facts.thresholds["trend_lines"]:
        why = "it is not measured on held-out prompts twice" if gain is None else f"{len(rewards)} steps are too few"
        yield unchecked("reward-hacking", f"whether the reward rises on prompts that are not trained on: {why}")
        return
    own, (held, half) = after - before, gain
    numbers: Numbers = {
        "reward at the start": before,
        "reward at the end": after,
        "change of the held-out reward": f"{held:+.3g} ± {half:.2g} (95 %)",
    }
    is_flat = own > half and held < facts.thresholds["held_out_share"] * own
    if not is_flat:
        words = f"The reward changed by {own:+.3g}, that of held-out prompts by {held:+.3g}"
        yield passed("reward-hacking", words, numbers=numbers)
        return
    greedy = facts.run.number("rollout.temperature_eval") == 0 and held > -half
    yield Finding(
        "reward-hacking",
        Severity.FAIL if held < -half else Severity.NOTE if greedy else Severity.WARN,
        f"The reward rose from {before:.3g} to {after:.3g} in training, and changed by {held:+.3g} on held-out "
        "prompts: what is learnt earns the reward and is not better",
        Evidence.RULE,
        numbers,
        harmless_if="evaluations take the likeliest token (temperature_eval 0), which was right before the training"
        if greedy
        else "held-out prompts are of another kind, or are rewarded otherwise",
        remedies=[
            Remedy("read completions with the highest rewards in rollouts.jsonl: what do they have in common?"),
            *(_stay_near(facts)),
            lower(facts, 3),
        ],
        thresholds=("held_out_share",),
        chart="reward",
        steps=(float(at[0]), float(at[-1])),
        explains=("worse-than-start",),
    )


def _stay_near(facts: Facts) -> list[Remedy]:
    words = "hold the policy closer to its reference"
    return times_beta(facts, 3, words) or [Remedy(words, {"post_training.beta": 0.02})]


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
    longer_not_better,
    reward_hacking,
    entropy_collapse,
    ratios_clipped,
    without_signal,
)
"""In the order in which findings of one severity are listed: what is behind the others first."""


def of_groups(facts: Facts) -> Iterator[Finding]:
    """Everything about groups, for runs that train on rewards: those of grpo, and pairs that are sampled."""
    if facts.trains_on_rewards:
        for check in ALL:
            yield from check(facts)


CHECKS = (of_groups,)
