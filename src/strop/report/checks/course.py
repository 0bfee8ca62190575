"""The course of a run by any method: numbers that are not finite, steps, gradients, evaluations. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from strop.report.checks.remedies import fewer_steps, longer_run, look_at_step, lower
from strop.report.escaping import excerpt
from strop.report.facts import Facts, wilson
from strop.report.findings import Evidence, Finding, Numbers, Remedy, Severity, passed, unchecked
from strop.significance import Change


def ended(facts: Facts) -> Iterator[Finding]:
    """A training that an error ended."""
    error = facts.run.failure.get("error")
    if isinstance(error, str):
        where, fix = (facts.run.failure.get(name) for name in ("where", "fix"))
        yield Finding(
            "ended-by-error",
            Severity.FAIL,
            f"The training was ended by an error: {excerpt(error, 400)}",
            Evidence.EXACT,
            {"where": excerpt(where, 200)} if isinstance(where, str) else {},
            remedies=[*([Remedy(excerpt(fix, 400))] if isinstance(fix, str) and fix else []), lower(facts, 10)],
            chart="loss",
            explains=("few-steps", "rate-low", "not-finite"),
        )


def finite(facts: Facts) -> Iterator[Finding]:
    """A loss that is no number."""
    train, evaluated = facts.run.train, facts.run.eval
    if not len(train) and not len(evaluated):
        yield unchecked("not-finite", "whether all numbers are finite: metrics.jsonl has no line")
        return
    skipped = int(train.total("num_skipped_steps"))
    of_evaluation = "reward" if facts.samples and facts.trains_on_rewards else "loss"
    bad = [
        (float(table.step[i]), words)
        for table, words, name in ((train, "training", "loss"), (evaluated, "evaluation", of_evaluation))
        for i in np.flatnonzero(~np.isfinite(table.columns.get(name, np.full(len(table), np.nan))))[:1].tolist()
    ]
    numbers: dict[str, float | int | str] = {"steps skipped": skipped}
    numbers |= {f"first not finite, {words}": f"step {step:.0f}" for step, words in bad}
    evaluation_is_bad = any(words == "evaluation" for _, words in bad)
    if bad or skipped:
        first = min((step for step, _ in bad), default=None)
        what = f"{of_evaluation} of an evaluation" if evaluation_is_bad else "loss"
        claim = (
            f"The {what} is not a finite number from step {first:.0f} on"
            if first is not None
            else f"{skipped:,} steps were skipped, since their loss or gradient was not finite"
        )
        severe = evaluation_is_bad or (bool(bad) and not skipped) or skipped > 0.01 * max(facts.num_steps, 100)
        yield Finding(
            "not-finite",
            Severity.FAIL if severe else Severity.WARN,
            claim,
            Evidence.EXACT,
            numbers,
            harmless_if="" if severe else "it is a single step, and the row that caused it is known",
            remedies=[
                Remedy("look at the rows that the log names at this step") if first is None else look_at_step(first),
                *_wider(facts),
                lower(facts, 2),
            ],
            chart="loss",
            steps=None if first is None else (first, facts.run.last_step),
            explains=("rate-high", "risen", "worse-than-start"),
        )
    else:
        yield passed("not-finite", f"All {len(train) + len(evaluated):,} logged losses are finite numbers")


def _wider(facts: Facts) -> list[Remedy]:
    if not facts.run.value("training.fp16"):
        return []
    return [Remedy("compute in bf16, whose range is that of float32", {"training.fp16": None, "training.bf16": True})]


def steps(facts: Facts) -> Iterator[Finding]:
    """Few steps, few chances to see anything."""
    done = facts.run.last_step
    if not done:
        yield unchecked("few-steps", "the number of steps: none is logged")
    elif done < facts.thresholds["few_steps"]:
        yield Finding(
            "few-steps",
            Severity.NOTE,
            f"The run has {done} optimizer steps, which is few for a course to be seen",
            Evidence.RULE,
            {"steps": done},
            harmless_if="it is a trial",
            remedies=[longer_run(facts)],
            thresholds=("few_steps",),
        )
    else:
        yield passed("few-steps", f"The run has {done:,} optimizer steps")


def spikes(facts: Facts) -> Iterator[Finding]:
    """Norms far above those before them."""
    at, norms = facts.run.train.series("grad_norm")
    if len(norms) < facts.thresholds["trend_lines"]:
        yield unchecked("gradient-spikes", f"spikes of the gradient: {len(norms)} logged steps are too few")
        return
    medians = _trailing_medians(norms)
    places = np.flatnonzero(norms[10:] > facts.thresholds["spike_size"] * medians[10:]) + 10
    share = len(places) / len(norms)
    if len(places):
        worst = int(places[np.argmax(norms[places] / medians[places])])
        often = share > facts.thresholds["spikes_share"] and len(places) > 2
        yield Finding(
            "gradient-spikes",
            Severity.WARN if often else Severity.NOTE,
            f"The gradient has {len(places):,} spikes, the largest of {norms[worst]:.3g} at step {at[worst]:.0f}, "
            f"where {medians[worst]:.3g} was usual",
            Evidence.RULE,
            {"logged steps with a spike": len(places), "share": share},
            harmless_if="they are single and clipped: a clipped step moves the weights no further than others",
            remedies=[
                look_at_step(float(at[worst])),
                Remedy("clip lower", {"training.max_grad_norm": 0.3}),
                lower(facts, 2),
            ],
            thresholds=("spike_size", "spikes_share"),
            chart="gradient",
            level=(facts.thresholds["spike_size"] * float(medians[worst]), "a spike, from here"),
            steps=(float(at[worst]), float(at[worst])),
        )
    else:
        yield passed("gradient-spikes", "The gradient has no spikes")


def _trailing_medians(values: np.ndarray, most: int = 100) -> np.ndarray:
    """The median of up to `most` values before each one, taken anew every tenth value, and for long series in 2,000
    places."""
    found = np.full(len(values), np.inf)
    stride = max(10, len(values) // 2000)
    for start in range(10, len(values), stride):
        found[start : start + stride] = max(float(np.median(values[max(0, start - most) : start])), 1e-12)
    return found


def clipping(facts: Facts) -> Iterator[Finding]:
    """Where every step is clipped, the limit is part of the learning rate."""
    clipped, norm = facts.last("clipped"), facts.last("grad_norm")
    limit = facts.run.number("training.max_grad_norm")
    if clipped is None or norm is None or not limit:
        return
    if clipped > facts.thresholds["clipped_share"] and norm > 10 * limit:
        yield Finding(
            "always-clipped",
            Severity.NOTE,
            f"Every step is clipped, from a norm of {norm:.3g} to {limit:g}: the limit decides how far a step goes",
            Evidence.MEASURED,
            {"share of steps clipped": clipped, "norm": norm, "training.max_grad_norm": limit},
            harmless_if="the optimizer divides by the size of the gradient, as Adam does, and the course is steady",
            remedies=[lower(facts, 3)],
            thresholds=("clipped_share",),
            chart="gradient",
        )
    else:
        yield passed("always-clipped", f"{clipped:.0%} of the last steps are clipped")


def evaluation_size(facts: Facts) -> Iterator[Finding]:
    """An accuracy of few rows says little."""
    table = facts.run.eval
    if not len(table):
        yield unchecked("eval-size", "the evaluation: there is none (dataset.val_file, dataset.validation_split)")
        return
    n = facts.last("num_groups", table)
    share = facts.last("rewards/accuracies", table)
    if n is None:
        return
    low, high = wilson(0.5 if share is None else share, n)
    half = (high - low) / 2
    what = "an accuracy" if share is not None else "a share"
    if half > facts.thresholds["eval_interval"]:
        yield Finding(
            "eval-size",
            Severity.NOTE,
            f"The evaluation has {int(n):,} rows, so {what} of it is known to ± {half:.1%} only",
            Evidence.MEASURED,
            {"validation rows": int(n), "half-width of the 95 % interval": half},
            harmless_if="only the shape of the course is wanted",
            remedies=[_more_held_out(facts)],
            thresholds=("eval_interval",),
        )
    else:
        yield passed("eval-size", f"The evaluation has {int(n):,} rows: {what} of it is known to ± {half:.1%}")


def _more_held_out(facts: Facts) -> Remedy:
    if all(facts.run.value(f"dataset.{key}") is None for key in ("val_file", "splits_dir")):
        return Remedy("hold out more rows: about 400 for ± 5 %", {"dataset.validation_split": 0.2})
    return Remedy("use a larger validation file: about 400 rows for ± 5 %")


def worse_than_start(facts: Facts) -> Iterator[Finding]:
    """The evaluation's loss ends above where it began."""
    if facts.samples and "loss" not in facts.run.eval:
        yield _less_reward(facts)
        return
    at, values = facts.run.eval.series("loss")
    if len(values) < 2:
        yield unchecked("worse-than-start", f"whether the model got worse: {_too_few(facts, len(values))}")
        return
    if at[0] != 0:
        yield unchecked("worse-than-start", "whether the model got worse: it was not evaluated before the first step")
        return
    t, first, end = facts.thresholds, float(values[0]), float(values[-1])
    size, low = max(abs(first), 1e-9), float(values.min())
    since_start = facts.change(at[0], at[-1])
    if end > first and since_start is not None and not since_start.is_rise:
        yield passed(
            "worse-than-start",
            f"The evaluation loss went from {first:.4g} to {end:.4g}: no more than chance does with these rows "
            f"({since_start.mean:+.2g} ± {since_start.half_width:.2g})",
            numbers=_interval(since_start),
        )
    elif end > first + max(t["first_loss"] * size, t["loss_rounding"]):
        bad = end > first + t["worse_fail"] * size + t["loss_rounding"]
        yield Finding(
            "worse-than-start",
            Severity.FAIL if bad else Severity.WARN,
            f"The model got worse: its evaluation loss was {first:.4g} before training and is {end:.4g} now",
            Evidence.MEASURED,
            {"evaluation loss before": first, "evaluation loss now": end, **_interval(since_start)},
            harmless_if="the validation rows are of another kind than the training rows",
            remedies=[lower(facts, 10), Remedy("train fewer steps", _fewer(facts, at[int(values.argmin())]))],
            thresholds=("worse_fail",),
            chart="loss",
            level=(first, "before training"),
            steps=(float(at[int(values.argmin())]), float(at[-1])),
            explains=() if low < first - t["risen_note"] * size else ("risen",),
        )
    else:
        words = "fell" if end < first else "went"
        yield passed("worse-than-start", f"The evaluation loss {words} from {first:.4g} to {end:.4g}")


def _less_reward(facts: Facts) -> Finding:
    """The same for a run that samples: whether held-out prompts end with less reward."""
    gain = facts.held_out_gain
    at, rewards = facts.run.eval.series("reward")
    if gain is None or at[0] != 0:
        why = "there are not two evaluations" if gain is None else "it was not evaluated before the first step"
        return unchecked("worse-than-start", f"whether the model got worse: {why}")
    first, end = float(rewards[0]), float(rewards[-1])
    numbers: Numbers = {"held-out reward before": first, "now": end, "95 % interval of the change": f"± {gain[1]:.2g}"}
    if gain[0] >= -gain[1]:
        return passed("worse-than-start", f"The held-out reward went from {first:.3g} to {end:.3g}", numbers=numbers)
    return Finding(
        "worse-than-start",
        Severity.FAIL,
        f"The model got worse: its reward on held-out prompts was {first:.3g} before training and is {end:.3g} now",
        Evidence.MEASURED,
        numbers,
        harmless_if="the held-out prompts are of another kind, or are rewarded otherwise",
        remedies=[lower(facts, 3), Remedy("train fewer steps", _fewer(facts, at[int(rewards.argmax())]))],
        chart="reward",
        steps=(float(at[int(rewards.argmax())]), float(at[-1])),
    )


def _too_few(facts: Facts, evaluations: int) -> str:
    if facts.samples:
        return "evaluations that sample have no loss"
    return "there is one evaluation only" if evaluations else "there is no evaluation"


def risen(facts: Facts) -> Iterator[Finding]:
    """The evaluation's loss ends above its lowest."""
    at, values = facts.run.eval.series("loss")
    if len(values) < 2:
        yield unchecked("risen", f"overfitting: {_too_few(facts, len(values))}")
        return
    t, first, end = facts.thresholds, float(values[0]), float(values[-1])
    size, low = max(abs(first), 1e-9), float(values.min())
    best = float(at[int(values.argmin())])
    gained = max(first - low, 1e-9)
    above = (end - low) / max(abs(low), 1e-9)
    since_best = facts.change(best, at[-1])
    numbers: Numbers = {"lowest evaluation loss": low, "at step": best, "at the end": end, **_interval(since_best)}
    by_chance = since_best is not None and not since_best.is_rise
    is_seen = end - low > max(0.05 * gained, t["loss_rounding"])
    if above > t["risen_note"] and is_seen and best > 0 and not by_chance:
        learnt = first - low > t["risen_note"] * size  # there was something before it was lost again
        bad = at[0] == 0 and learnt and end > first + t["worse_fail"] * size
        epoch = facts.run.plan.get("steps_per_epoch")
        seen_once = isinstance(epoch, int) and facts.run.last_step <= epoch  # nothing can be known by heart
        compare = Remedy("compare rows of both files: are they of one kind, and do both call the better answer chosen?")
        yield Finding(
            "risen",
            Severity.FAIL if bad else Severity.WARN if above > t["risen_warn"] else Severity.NOTE,
            f"The evaluation loss was lowest at step {best:.0f} ({low:.4g}) and has risen to {end:.4g} since: "
            + ("what the rows teach does not hold here" if seen_once else "the model learns its rows by heart"),
            Evidence.RULE,
            numbers,
            harmless_if="the final model is that of the best step (finetuning.load_best_model_at_end), or only "
            "its certainty grows while its accuracy holds",
            remedies=[
                compare if seen_once else Remedy("train on more rows, if there are some"),
                Remedy("stop where it was best", _fewer(facts, best)),
                Remedy("return the best model", {"finetuning.load_best_model_at_end": True}),
                lower(facts, 2),
            ],
            thresholds=("risen_note", "risen_warn"),
            chart="loss",
            level=(low, "the lowest evaluation"),
            steps=(best, float(at[-1])),
            explains=("worse-than-start",) if learnt else (),
        )
    else:
        yield passed("risen", "The evaluation loss does not rise again", numbers=numbers)


def _interval(change: Change | None) -> Numbers:
    """A change as numbers of a finding."""
    return {} if change is None else {"change, by paired rows": f"{change.mean:+.3g} ± {change.half_width:.2g} (95 %)"}


def _fewer(facts: Facts, step: float) -> Mapping[str, Any]:
    return {"training.max_steps": int(step)} if step >= 1 else fewer_steps(facts).settings


def repetition(facts: Facts) -> Iterator[Finding]:
    """Answers that say the same again and again, and did not before training."""
    shares = {
        when: [share for s in facts.run.samples if (share := getattr(s, when).repeated) is not None]
        for when in ("first", "last")
    }
    if not facts.run.samples or all(s.first is s.last for s in facts.run.samples):
        yield unchecked(
            "repetition", "whether answers repeat themselves: there are no samples (finetuning.sample_prompts)"
        )
        return
    if not shares["last"]:
        yield passed("repetition", "The samples are too short to repeat themselves")
        return
    before, now = (float(np.mean(found)) if found else 0.0 for found in shares.values())
    has_risen = now > before + facts.thresholds["repeated_warn"] / 2
    yield facts.thresholds.graded(
        "repetition",
        now if has_risen else -math.inf,  # a base model may repeat itself, too
        ("repeated_warn", "repeated_fail"),
        f"Answers repeat themselves: {now:.0%} of their runs of four words stand in them before, where it was "
        f"{before:.0%} before training",
        otherwise=f"{now:.0%} of the runs of four words in the samples are repeated, before training {before:.0%}",
        evidence=Evidence.RULE,
        numbers={"repeated before training": before, "repeated now": now, "samples": len(shares["last"])},
        harmless_if="answers are meant to be repetitive, such as tables or code",
        remedies=[
            Remedy("read the samples below, and some rows: do the rows repeat themselves?", reads="samples"),
            lower(facts, 3),
            fewer_steps(facts),
            Remedy("check that the rows end with an end token: strop train --dry-run shows it"),
        ],
    )


CHECKS = (ended, finite)
GENERAL = (repetition, worse_than_start, risen, spikes, clipping, steps, evaluation_size)
"""Listed after the checks of the method."""
