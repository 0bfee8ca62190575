"""Groups with rewards (grpo, and pairs that are sampled). Floor 2."""

from __future__ import annotations

from collections.abc import Iterator

from strop.report.facts import Facts
from strop.report.findings import Evidence, Finding, Remedy, unchecked


def without_signal(facts: Facts) -> Iterator[Finding]:
    """A group whose completions all have the same reward has advantages of 0, or no pair, and teaches nothing."""
    if facts.method != "grpo" and not (facts.samples and facts.is_pairs):
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
        f"In {share:.0%} of the groups all completions have the same reward, so they teach nothing",
        otherwise=f"In {1 - share:.0%} of the groups the rewards differ",
        evidence=Evidence.MEASURED,
        numbers={"share of groups without signal": share, "logged steps": len(shares)},
        harmless_if="the prompts are solved by now",
        remedies=[
            Remedy("look at rollouts.jsonl: are the prompts too hard or too easy, or do the rewards never apply?"),
            Remedy("sample more completions per prompt", {"rollout.num_generations": _more(facts)}),
            Remedy("leave such groups out and draw further prompts", {"rollout.dynamic_sampling": True}),
        ],
        steps=(float(at[0]), float(at[-1])),
        explains=("gradient-zero", "weights-unmoved"),
    )


def _more(facts: Facts) -> int:
    return 2 * int(facts.run.number("rollout.num_generations") or 8)


CHECKS = (without_signal,)
