"""What the rewards of sampled completions say (grpo, and pairs that are sampled). Floor 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from strop.config.grpo_settings import ALONE
from strop.readable import is_number
from strop.report.checks.remedies import COSTS_LENGTH, by_algorithm, lower, times_beta
from strop.report.escaping import excerpt
from strop.report.facts import Facts, wilson
from strop.report.findings import RUN, Evidence, Finding, Numbers, Remedy, Severity, passed, unchecked


def without_signal(facts: Facts) -> Iterator[Finding]:
    """A group whose completions all have the same reward has advantages of 0, or no pair, and teaches nothing."""
    if facts.run.value("post_training.advantage") in ALONE:
        return
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
        explains=("gradient-zero", "weights-unmoved", "ratios-never-clipped"),
    )


def _forecast(facts: Facts) -> str:
    """What was forecast before the first step, as the end of a sentence; nothing where nothing was."""
    if (found := _forecast_numbers(facts)) is None:
        return ""
    share, low, high, count = found
    return (
        f"; at the start, {share:.0%} were forecast to have the same reward throughout (95 %: {low:.0%} to {high:.0%}, "
        f"from {count:.0f} prompts)"
    )


def _forecast_numbers(facts: Facts) -> tuple[float, float, float, float] | None:
    """(share of groups without signal, its 95 % interval, of how many prompts) as forecast before the first step."""
    numbers = [facts.run.forecast.get(name) for name in ("without_signal", "low", "high", "num_prompts")]
    if not all(is_number(x) and 0 <= x < 1e9 for x in numbers):
        return None
    share, low, high, count = (float(x or 0) for x in numbers)
    return share, low, high, count


def more_than_forecast(facts: Facts) -> Iterator[Finding]:
    """The forecast samples as the first steps do, so these should have as many groups without signal."""
    at, shares = facts.run.train.series("frac_reward_zero_std")
    forecast = None if facts.run.value("post_training.advantage") in ALONE else _forecast_numbers(facts)
    if forecast is None or not len(shares) or facts.run.value("rollout.dynamic_sampling") is True:
        return  # dynamic sampling leaves such groups out before they are counted
    expected, low, high, _ = forecast
    early = facts.beginning(shares, facts.run.train)
    share, count = float(early.mean()), facts.first("num_groups")
    least, _ = wilson(share, len(early) * (count or 1))
    yield facts.thresholds.graded(
        "forecast-exceeded",
        least - high,
        ("forecast_excess_warn",),
        f"In the first {len(early)} logged steps {share:.0%} of the groups have no signal, and {expected:.0%} were "
        f"forecast (95 %: {low:.0%} to {high:.0%}): completions of a prompt have become alike",
        otherwise=f"At the start {share:.0%} of the groups have no signal; {expected:.0%} were forecast",
        evidence=Evidence.RULE,
        numbers={"share without signal": share, "forecast": expected, "logged steps": len(early)},
        harmless_if="prompts of the first steps are unlike the others",
        remedies=[
            Remedy("look at rollouts.jsonl: if completions of a prompt are the same text, something repeats an answer"),
            Remedy("sample from the whole distribution", {"rollout.temperature": 1.0}),
            lower(facts, 3),
        ],
        chart="signal",
        level=(high, "forecast at most"),
        steps=(float(at[0]), float(at[len(early) - 1])),
        explains=("groups-without-signal",),
    )


def _more(facts: Facts) -> int:
    return min(1024, 2 * int(facts.run.number("rollout.num_generations") or 8))  # the most that there can be


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
    elsewhere = f"fell by {-held:.3g}" if held < -half else f"changed by {held:+.3g} ± {half:.2g}"
    yield Finding(
        "reward-hacking",
        Severity.FAIL if held < -half else Severity.NOTE if greedy else Severity.WARN,
        f"The reward rose from {before:.3g} to {after:.3g} in training, and {elsewhere} on held-out prompts: what is "
        "learnt earns the reward and is not better",
        Evidence.RULE,
        numbers,
        harmless_if="evaluations take the likeliest token (temperature_eval 0), which was right before the training"
        if greedy
        else "held-out prompts are of another kind, or are rewarded otherwise",
        remedies=[
            Remedy(
                "read the completions of the step with the highest reward (rollouts.jsonl has all): what do they have "
                "in common? Mend the reward that pays for it",
                look=("replay", RUN, "--step", f"{at[int(np.argmax(rewards))]:.0f}", "--rows"),
            ),
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


class _Course(NamedTuple):
    """One of several rewards from the first to the last logged steps. before, after: its mean. gain: how far it went
    the way that its weight pays for. noise: half the width of the 95 % interval of that. spread_before, spread_after:
    its standard deviation among the completions of a step."""

    name: str
    before: float
    after: float
    gain: float
    noise: float
    spread_before: float
    spread_after: float


def one_reward_wins(facts: Facts) -> Iterator[Finding]:
    """A reward that all completions have pays for nothing more; where others fell meanwhile, it was paid with them."""
    t, weights = facts.thresholds, facts.run.rewards
    if len(weights) < 2:
        return
    courses = [course for name in weights if (course := _course(facts, name, weights[name])) is not None]
    if len(courses) < 2:
        yield unchecked("one-reward-wins", "whether one reward rises at the cost of others: too few steps are logged")
        return
    won = [
        c
        for c in courses
        if weights[c.name] and c.gain > c.noise and c.spread_after <= t["reward_spread_left"] * c.spread_before
    ]
    fell = [c for c in courses if -c.gain > max(c.noise, t["reward_fall"] * max(c.spread_before, c.spread_after))]
    if not won or not fell:
        yield passed("one-reward-wins", "No reward is at its highest while others have fallen")
        return
    numbers: Numbers = {excerpt(c.name, 60): f"{c.before:.3g} to {c.after:.3g}" for c in (*won, *fell)}
    at, _ = facts.run.train.series(_mean(won[0].name))
    fallen = ", ".join(f"{excerpt(c.name, 60)} from {c.before:.3g} to {c.after:.3g}" for c in fell)
    yield Finding(
        "one-reward-wins",
        Severity.WARN,
        f"Nearly all completions have the reward {excerpt(won[0].name, 60)} ({won[0].after:.3g}, {won[0].before:.3g} "
        f"at the start), while others fell: {fallen}",
        Evidence.RULE,
        numbers,
        harmless_if="the reward that is won is the one that matters",
        remedies=[
            Remedy("give what fell more weight, and what is won less (the weight of each of rewards)"),
            by_algorithm(facts, "normalise each reward by itself", "gdpo"),
            *_stay_near(facts),
        ],
        thresholds=("reward_spread_left", "reward_fall"),
        chart="reward",
        steps=(float(at[0]), float(at[-1])),
        explains=("reward-hacking",),
    )


def _mean(name: str) -> str:
    return f"rewards/{name}/mean"


def _course(facts: Facts, name: str, weight: float) -> _Course | None:
    """None where too few steps have it."""
    spread = f"rewards/{name}/std"
    ends = [facts.first(_mean(name)), facts.last(_mean(name)), facts.first(spread), facts.last(spread)]
    if len(facts.run.train.series(_mean(name))[1]) < facts.thresholds["trend_lines"] or None in ends:
        return None
    before, after, *spreads = (x or 0.0 for x in ends)
    gain = before - after if weight < 0 else after - before
    return _Course(name, before, after, gain, facts.noise(_mean(name)), *spreads)


def length_rewarded(facts: Facts) -> Iterator[Finding]:
    """A reward that goes with the length of a completion may be had by writing more."""
    at, values = facts.run.train.series("rewards/length_correlation")
    if len(values) < facts.thresholds["trend_lines"]:
        if facts.samples:
            why = f"{len(values)} logged steps in which both differ are too few"
            yield unchecked("length-rewarded", f"whether longer completions have the higher rewards: {why}")
        return
    found = float(values.mean())
    yield facts.thresholds.graded(
        "length-rewarded",
        found,
        ("length_correlation_warn",),
        f"Within a group, reward and length have a correlation of {found:.2f}: longer completions have the higher "
        "rewards",
        otherwise=f"Within a group, reward and length have a correlation of {found:.2f}",
        evidence=Evidence.RULE,
        numbers={"mean correlation": found, "logged steps": len(values)},
        harmless_if="longer completions are wanted, as where answers need their reasoning",
        remedies=[
            Remedy("read rollouts.jsonl: are long completions better, or do they only have more of what is counted?"),
            COSTS_LENGTH,
            *_stay_near(facts),
        ],
        chart="lengths",
        steps=(float(at[0]), float(at[-1])),
    )
