"""Which charts a page has, by what the run logged. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from strop.report.charts import Chart, LineChart, Region, Series, heat_map
from strop.report.diagnose import Examined
from strop.report.facts import Facts, wilson
from strop.report.run_record import RunRecord, Table

MOST_HEATS = 4
MOST_REGIONS = 3


def charts_of(examined: Sequence[Examined], labels: Sequence[str]) -> list[Chart]:
    """All charts, those first that a finding is about."""
    many = len(examined) > 1
    facts = [Facts(e.run, e.thresholds) for e in examined]
    drawn: list[LineChart] = []
    for make in MAKERS:
        charts = [(chart, label) for f, label in zip(facts, labels, strict=True) if (chart := make(f)) is not None]
        if not charts:
            continue
        first = charts[0][0]
        if many:
            first.series = [_named(chart.series, label) for chart, label in charts]
        drawn.append(first)
    raised = [f for e in examined for f in e.diagnosis.raised]
    for chart in drawn:
        found = [f for f in raised if f.chart == chart.key and f.steps is not None][:MOST_REGIONS]
        chart.regions = [Region(*f.steps, f"{f.id}: {f.claim}") for f in found if f.steps is not None]
        if not many:
            for f in raised:
                if f.chart == chart.key and f.level is not None and not _is_drawn(f.level[0], chart.levels):
                    chart.levels = [*chart.levels, f.level]
        if found and not many:
            begin, end = chart.regions[0].first, chart.regions[0].last
            chart.note = f"Shaded: steps {begin:,.0f} to {end:,.0f} ({found[0].id})"
    wanted = {f.chart: place for place, f in reversed(list(enumerate(raised)))}
    drawn.sort(key=lambda chart: wanted.get(chart.key, len(raised)))
    return [picture for chart in drawn if (picture := chart.draw()) is not None]


def _is_drawn(value: float, levels: Sequence[tuple[float, str]]) -> bool:
    """Whether there is a line at this value already, or so near that its words would stand over the others."""
    return any(abs(value - other) <= 0.05 * max(abs(value), abs(other)) for other, _ in levels)


def _named(series: Sequence[Series], label: str) -> Series:
    """The one line of a run beside others: that of the evaluations, or the first one."""
    best = next((s for s in series if s.dots), series[0])
    return Series(label, best.steps, best.values)


def heat_maps(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Chart]:
    """The margins of each run over its steps."""
    found: list[Chart] = []
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        note = (
            "Steps from left to right, margins (chosen minus rejected, not times beta) from below; darker: more pairs."
        )
        title = "Margins of the training pairs" + (f": {label}" if len(runs) > 1 else "")
        key = "margins" if len(runs) == 1 else f"margins-{place + 1}"
        chart = heat_map(key, title, note, run.margins.steps, run.margins.values)
        if chart is not None:
            found.append(chart)
    if len(found) > MOST_HEATS:
        last = found[MOST_HEATS - 1]
        found[MOST_HEATS - 1] = replace(
            last, note=f"{last.note} The first {MOST_HEATS} of {len(found)} runs are drawn."
        )
    return found[:MOST_HEATS]


def _both(facts: Facts, name: str, word: str = "") -> list[Series]:
    """A metric in training and in the evaluations."""
    lead = f"{word} " if word else ""
    parts = [(f"{lead}train", facts.run.train, False), (f"{lead}eval", facts.run.eval, True)]
    return [Series(label, *table.series(name), dots=dots) for label, table, dots in parts if name in table]


def _loss(facts: Facts) -> LineChart | None:
    series = _both(facts, "loss")
    levels = []
    if facts.method == "dpo" and facts.loss_type in ("sigmoid", "robust", "aot", "sigmoid_norm"):
        levels = [(math.log(2), "ln 2: no preference")]
    note = "Of sampled groups it says nothing: read the reward." if facts.method == "grpo" else ""
    return LineChart("loss", "Loss", series, note, levels) if series else None


def _rewards(facts: Facts) -> LineChart | None:
    """How much likelier both sides have become."""
    names = {
        "chosen": "desirable" if facts.method == "kto" else "chosen",
        "rejected": "undesirable" if facts.method == "kto" else "rejected",
    }
    series = [Series(names[side], *facts.ratio_per_token(side)) for side in ("chosen", "rejected")]
    series = [s for s in series if len(s.steps)]
    title = f"Likelihood against the reference, nats per token ({facts.watched_words})"
    return LineChart("rewards", title, series, levels=[(0.0, "as the reference")]) if series else None


def _likelihood(facts: Facts) -> LineChart | None:
    if facts.has_reference or not facts.is_pairs:
        return None
    series = [
        Series(side, *facts.watched.series(f"logps_per_token/{side}"))
        for side in ("chosen", "rejected")
        if f"logps_per_token/{side}" in facts.watched
    ]
    title = f"Likelihood of both sides, nats per token ({facts.watched_words})"
    return LineChart("likelihood", title, series) if series else None


def _accuracy(facts: Facts) -> LineChart | None:
    series = []
    if "rewards/accuracies" in facts.run.train:
        series.append(Series("train", *facts.run.train.series("rewards/accuracies")))
    if "rewards/accuracies" in facts.run.eval:
        steps, values = facts.run.eval.series("rewards/accuracies")
        if facts.has_reference:  # before the first step all pairs are ties, which count as wrong
            steps, values = steps[steps > 0], values[steps > 0]
        series.append(Series("eval", steps, values, dots=True, spread=_spread(facts.run.eval, values)))
    return LineChart("accuracy", "Pairs told apart (accuracy)", series, levels=[(0.5, "a coin")]) if series else None


def _spread(table: Table, values: np.ndarray) -> np.ndarray | None:
    """[n] half-widths of the 95 % intervals of shares."""
    groups = table.series("num_groups")[1][-len(values) or None :]
    if len(groups) != len(values):
        return None
    pairs = zip(np.clip(values, 0, 1).tolist(), groups.tolist(), strict=True)
    return np.array([(high - low) / 2 for low, high in (wilson(v, n) for v, n in pairs)])


def _kl(facts: Facts) -> LineChart | None:
    series = [
        Series(words, *facts.run.train.series(name))
        for name, words in (("kl", "z0" if facts.method == "kto" else "policy"), ("kl_unclamped", "not clamped"))
        if name in facts.run.train
    ]
    title = "Divergence from the reference (z0), nats" if facts.method == "kto" else "Nats per token from the reference"
    return LineChart("kl", title, series) if series else None


def _reward(facts: Facts) -> LineChart | None:
    series = _both(facts, "reward") if facts.trains_on_rewards else []
    return LineChart("reward", "Mean reward of a completion", series) if series else None


def _gradient(facts: Facts) -> LineChart | None:
    limit = facts.run.number("training.max_grad_norm")
    levels = [(limit, "clipped above")] if limit else []
    series = [Series("norm", *facts.run.train.series("grad_norm"))] if "grad_norm" in facts.run.train else []
    return LineChart("gradient", "Norm of the gradient, before clipping", series, levels=levels) if series else None


def _single(key: str, title: str, name: str, word: str) -> Callable[[Facts], LineChart | None]:
    """A chart of one metric of the training."""

    def make(facts: Facts) -> LineChart | None:
        return LineChart(key, title, [Series(word, *facts.run.train.series(name))]) if name in facts.run.train else None

    return make


def _lengths(facts: Facts) -> LineChart | None:
    if facts.trains_on_rewards:
        series = _both(facts, "completions/mean_length")
        return LineChart("lengths", "Tokens of a completion", series) if series else None
    names = ("chosen", "rejected") if facts.method != "sft" else ("completion",)
    series = [
        Series(side, *facts.run.train.series(f"lengths/{side}"))
        for side in names
        if f"lengths/{side}" in facts.run.train
    ]
    return LineChart("lengths", "Trained tokens of a completion", series) if series else None


MAKERS = (
    _reward,
    _loss,
    _rewards,
    _likelihood,
    _accuracy,
    _kl,
    _gradient,
    _single("rate", "Learning rate", "learning_rate", "rate"),
    _single("update", "Size of an update against the weights", "update_ratio", "ratio"),
    _single("moved", "Weights that an update changes", "changed_fraction", "share"),
    _lengths,
    _single("clipped", "Completions that reach the length limit", "completions/clipped_ratio", "share"),
    _single("signal", "Groups whose rewards are all the same", "frac_reward_zero_std", "share"),
    _single("ratios", "Tokens whose ratio is clipped", "clip_ratio/region_mean", "share"),
    _single("sampler", "Sampler and trainer apart, nats per token", "sampling/sampling_logp_difference/mean", "mean"),
    _single("entropy", "Entropy, nats per token", "entropy", "entropy"),
    _single("speed", "Tokens per second", "tokens_per_second", "tokens/s"),
    _single("memory", "Most memory held so far, GiB", "peak_memory_gib", "GiB"),
)
"""In this order where no finding is about one."""
READING: Mapping[str, str] = {
    "reward": "Should rise, and that of evaluations with it; where only training rises, what is learnt is not better.",
    "loss": "Should fall. An evaluation that rises again says that rows are learnt by heart; losses of sampled groups "
    "say nothing.",
    "rewards": "How much likelier an answer has become than it is for the reference. The sides should part, and the "
    "chosen one should not fall far.",
    "likelihood": "The chosen side should rise, or fall less than the rejected one.",
    "accuracy": "Pairs whose chosen side gains more; bars are 95 % intervals. Noisy labels keep it below 1.",
    "kl": "How far the policy has gone. Beyond some nats per token, text falls apart.",
    "gradient": "Should be steady or fall. Single spikes are rows unlike the others.",
    "rate": "What warm-up and scheduler made of training.learning_rate.",
    "update": "1e-5 to 1e-3 is usual in a step; far less moves nothing, far more destroys.",
    "moved": "Where it is far below 1, updates are lost to rounding.",
    "lengths": "Of sampled completions: should not grow without a gain in reward. Of rows: what the data has.",
    "clipped": "Completions without an end. Should be near 0.",
    "signal": "Such groups teach nothing: their prompts are too easy or too hard.",
    "ratios": "Tokens without a gradient, since the policy has moved since they were sampled.",
    "sampler": "Should be near 0: both are meant to be the same model.",
    "entropy": "How undecided the policy is. Near 0 it samples the same again and again.",
    "speed": "Differs with the lengths of the rows of a step.",
    "memory": "Grows until the longest step has been taken.",
    "margins": "Darker: more pairs. Those below 0 are lost. It should move up, and need not leave 0 behind wholly.",
}
"""How to read each chart, by its key."""
