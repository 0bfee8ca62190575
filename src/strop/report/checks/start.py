"""What must hold at the first step: identities, which raise no false alarm. Floor 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from strop.report.checks.remedies import fewer_steps, higher
from strop.report.escaping import excerpt
from strop.report.facts import LN2, Facts
from strop.report.findings import Evidence, Finding, Remedy, Severity, passed, unchecked


def rate_is_zero(facts: Facts) -> Iterator[Finding]:
    """A rate of 0 trains nothing."""
    _, rates = facts.run.train.series("learning_rate")
    if not len(rates):
        yield unchecked("rate-zero", "the learning rate: no training step is logged")
        return
    zero = int((rates == 0).sum())
    asked = facts.run.number("training.learning_rate")
    if (zero == len(rates) and len(rates) > 1) or asked == 0:
        yield Finding(
            "rate-zero",
            Severity.FAIL,
            f"The learning rate is 0 in all {len(rates):,} logged steps, so nothing is trained",
            Evidence.EXACT,
            {"training.learning_rate": asked if asked is not None else 0.0, "logged steps": len(rates)},
            remedies=[
                Remedy("look at the warm-up and at training.lr_scheduler: they keep the rate at 0")
                if asked
                else Remedy("take the default learning rate", {"training.learning_rate": None})
            ],
            chart="rate",
            explains=(
                "weights-unmoved",
                "rate-low",
                "accuracy-half",
                "accuracy-falls",
                "sft-still",
                "few-steps",
                "odds-idle",
                "ratios-never-clipped",
            ),
        )
    else:
        yield passed("rate-zero", f"The learning rate is above 0; its highest logged value is {rates.max():.3g}")


def gradient_is_zero(facts: Facts) -> Iterator[Finding]:
    """No weight that trains has a part in the loss, or the loss is flat."""
    _, norms = facts.run.train.series("grad_norm")
    if not len(norms):
        yield unchecked("gradient-zero", "the gradient: no training step with a finite gradient is logged")
        return
    zero = int((norms == 0).sum())
    if zero == len(norms):
        yield Finding(
            "gradient-zero",
            Severity.FAIL,
            f"The gradient is exactly 0 in all {zero:,} logged steps, so nothing is trained",
            Evidence.EXACT,
            {"logged steps": len(norms)},
            remedies=[
                *_flat_loss(facts),
                Remedy("check lora.target_modules and models.0.adapter: does any weight train?"),
            ],
            chart="gradient",
            explains=(
                "weights-unmoved",
                "rate-low",
                "accuracy-half",
                "accuracy-falls",
                "sft-still",
                "odds-idle",
                "ratios-never-clipped",
            ),
        )
    elif zero:
        share = zero / len(norms)
        yield Finding(
            "gradient-zero",
            Severity.NOTE,
            f"The gradient is exactly 0 in {zero:,} of {len(norms):,} logged steps ({share:.0%})",
            Evidence.EXACT,
            {"logged steps with gradient 0": zero},
            harmless_if="the loss cannot fall any further on these rows",
            remedies=[fewer_steps(facts)],
            chart="gradient",
        )
    else:
        yield passed("gradient-zero", "Every logged step has a gradient")


def _flat_loss(facts: Facts) -> list[Remedy]:
    """Where to look for what makes a loss flat, by what the method trains on."""
    if facts.is_pairs:
        return [Remedy("look at the pairs below: are both sides the same after the cut?", reads="pairs")]
    if facts.trains_on_rewards:
        return [Remedy("look at the rewards of each group: do they differ, and are completions left out of the loss?")]
    return [Remedy("look at a rendered row: is any token trained? strop train --dry-run")]


def teacher_is_student(facts: Facts) -> Iterator[Finding]:
    """A student that is its teacher has nothing to learn from it."""
    same = facts.run.plan.get("teacher_is_student")
    if facts.method != "distill":
        return
    if not isinstance(same, bool):
        yield unchecked("teacher-is-student", "whether teacher and student are the same model: plan.json does not say")
    elif same:
        yield Finding(
            "teacher-is-student",
            Severity.FAIL,
            "Teacher and student are the same model before training, so there is nothing to learn: what moves is "
            "rounding",
            Evidence.EXACT,
            {"post_training.teacher_model_id": excerpt(str(facts.run.value("post_training.teacher_model_id")), 200)},
            remedies=[Remedy("name another, better model in post_training.teacher_model_id")],
            explains=("gradient-zero", "weights-unmoved", "worse-than-start", "risen", "few-steps", "rate-high"),
        )
    else:
        yield passed("teacher-is-student", "Teacher and student are different models")


def weights_stand_still(facts: Facts) -> Iterator[Finding]:
    """Updates below the resolution of the weights are rounded away, for ever."""
    moved, norm = facts.last("changed_fraction"), facts.last("grad_norm")
    if moved is None:
        yield unchecked("weights-unmoved", "whether updates change the weights: the run does not say")
        return
    least = facts.thresholds["moved_share"]
    if moved < least and norm:
        yield Finding(
            "weights-unmoved",
            Severity.FAIL if moved < least / 10 else Severity.WARN,
            f"An update changes {moved:.2%} of the weights: most of it is lost to rounding",
            Evidence.EXACT,
            {
                "share of the weights that changed": moved,
                "norm of the gradient": norm,
                "learning rate": facts.rate or 0,
            },
            remedies=[higher(facts, 10)],
            thresholds=("moved_share",),
            chart="moved",
            level=(least, "worth a look: below"),
            explains=("rate-low", "sft-still", "accuracy-half", "accuracy-falls", "odds-idle", "ratios-never-clipped"),
        )
    else:
        yield passed("weights-unmoved", f"An update changes {moved:.0%} of the weights")


def first_loss(facts: Facts) -> float | None:
    """What the preference loss must be before the first step, where policy and reference are the same model."""
    run, beta = facts.run, facts.beta
    if beta is None or run.value("post_training.wpo_weighting", False):
        return None
    if facts.method == "ipo":
        return 1 / (4 * beta * beta)
    if facts.method == "kto":
        return _first_loss_of_labels(facts)
    e = run.number("post_training.label_smoothing") or 0.0
    losses = {
        "hinge": 1.0,
        "ipo": 1 / (4 * beta * beta),
        "kto_pair": 1.0,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": (LN2 + 1) / 2,
        "bco_pair": 2 * LN2,
        "nca_pair": 2 * LN2,
        "sppo_hard": 0.5 / beta**2,
        "exo_pair": -LN2 - 0.5 * math.log(e * (1 - e)) if 0 < e < 1 else None,
        **dict.fromkeys(("sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"), LN2),
    }
    return losses.get(facts.loss_type)


def _first_loss_of_labels(facts: Facts) -> float | None:
    """Half the mean weight of the validation rows."""
    names = ("desirable", "undesirable")
    counts = [facts.count("eval", "findings", name) or 0.0 for name in names]
    weights = [facts.run.number(f"post_training.{name}_weight") or 0.0 for name in names]
    return 0.5 * sum(n * w for n, w in zip(counts, weights, strict=True)) / sum(counts) if sum(counts) else None


def reference_is_the_start(facts: Facts) -> Iterator[Finding]:
    """Before the first step policy and reference are one model, so every log-ratio is 0, and the loss is known."""
    if not facts.has_reference:
        return
    id_ = "reference-mismatch"
    if not facts.starts_at_reference:
        yield unchecked(
            id_, "whether the reference is the model at the start: another one was asked for (ref_model_id)"
        )
        return
    found = _start_ratio(facts)
    if found is None:
        yield unchecked(
            id_,
            "whether the reference is the model at the start: there is no evaluation before the first step "
            "(training.eval_at_start), and no margin of the first step",
        )
        return
    ratio, tokens, where = found
    allowed = facts.thresholds["first_margin"] * math.sqrt(max(tokens, 100) / 100)
    numbers: dict[str, float | int | str] = {
        "log-ratio at the start, nats": ratio,
        "allowed": allowed,
        "measured": where,
    }
    if abs(ratio) > allowed:
        yield Finding(
            id_,
            Severity.FAIL,
            f"Policy and reference are not the same model at the start: log-ratios of {ratio:+.3g} nats per "
            "completion, where they must be 0",
            Evidence.EXACT,
            numbers,
            harmless_if="another reference was meant: then name it, post_training.ref_model_id",
            remedies=[
                Remedy("score the reference anew", {"training.reference_store": False}),
                Remedy("if the model was trained with an adapter before, merge it into its base first"),
            ],
            thresholds=("first_margin",),
            chart="rewards",
            steps=(0, 1),
            explains=("first-loss", "drift", "saturated", "likelihood-displacement", "rate-high"),
        )
    else:
        yield passed(id_, "At the start, policy and reference are the same model", numbers=numbers)
    yield from _first_loss_holds(facts)


def _start_ratio(facts: Facts) -> tuple[float, float, str] | None:
    """(mean log-ratio of a completion or difference of two, its tokens, where it was measured) before any update."""
    table, beta = facts.run.eval, facts.beta
    if len(table) and table.step[0] == 0 and beta is not None:
        names = ("rewards/margins", "rewards/chosen", "rewards/rejected")
        found = [float(table.columns[n][0]) / beta for n in names if n in table and math.isfinite(table.columns[n][0])]
        lengths = table.columns.get("lengths/chosen")
        if found:
            tokens = float(lengths[0]) if lengths is not None and math.isfinite(lengths[0]) else 100.0
            return max(found, key=abs), tokens, "evaluation before the first step"
    if facts.run.margins.steps and facts.run.margins.steps[0] == 1 and len(facts.run.margins.values[0]):
        values = facts.run.margins.values[0].astype(np.float64)
        tokens = facts.first("lengths/chosen") or 100.0
        return float(values[np.abs(values).argmax()]), tokens, "margins of step 1"
    return None


def _first_loss_holds(facts: Facts) -> Iterator[Finding]:
    table, expected = facts.run.eval, first_loss(facts)
    name = facts.loss_name(table)
    if expected is None or not len(table) or table.step[0] != 0 or name not in table:
        why = (
            "this loss has no fixed first value" if expected is None else "there is no evaluation before the first step"
        )
        yield unchecked("first-loss", f"the loss at the start: {why}")
        return
    found = float(table.columns[name][0])
    sixteen = facts.run.value("training.bf16") or facts.run.value("training.fp16")
    allowed = facts.thresholds["first_loss"] * (20 if sixteen else 1) * max(abs(expected), 0.1)
    numbers = {"loss at the start": found, "must be": expected}
    if not abs(found - expected) <= allowed:
        yield Finding(
            "first-loss",
            Severity.FAIL,
            f"The loss at the start is {found:.4g}, where policy and reference are the same and it must be "
            f"{expected:.4g}",
            Evidence.EXACT,
            numbers,
            remedies=[Remedy("score the reference anew", {"training.reference_store": False})],
            thresholds=("first_loss",),
            chart="loss",
            steps=(0, 1),
            explains=("rate-high",),
        )
    else:
        yield passed("first-loss", f"The loss at the start is {found:.4g}, as it must be", numbers=numbers)


def first_likelihood(facts: Facts) -> Iterator[Finding]:
    """How likely demonstrations are before training: worse than drawing tokens at random cannot be."""
    if facts.method != "sft":
        return
    table = facts.run.eval if len(facts.run.eval) and facts.run.eval.step[0] == 0 else facts.run.train
    name = "nll" if "nll" in table else "loss"
    found = facts.first(name, table) if len(table) else None
    if facts.run.value("post_training.loss_reduction", "tokens") != "tokens" and name == "loss":
        found = None
    if found is None:
        yield unchecked("first-likelihood", "how likely the answers are before training: no loss is logged")
        return
    size = facts.run.plan.get("vocabulary")
    numbers: dict[str, float | int | str] = {"nats per token at the start": found}
    t, steps = facts.thresholds, (0.0, float(table.step[0]) + 1)
    more: dict[str, Any] = {"chart": "loss", "steps": steps, "numbers": numbers}
    if isinstance(size, int) and size > 1:
        numbers["tokens drawn at random"] = math.log(size)
        if found > math.log(size):
            yield Finding(
                "first-likelihood",
                Severity.FAIL if found > math.log(size) + t["sft_random"] else Severity.NOTE,
                f"Before training the answers are less likely ({found:.3g} nats per token) than tokens drawn at random "
                f"({math.log(size):.3g})",
                Evidence.EXACT,
                harmless_if="the model starts from random weights",
                remedies=[Remedy("check that tokenizer and model belong together, and that all weights were loaded")],
                thresholds=("sft_random",),
                **more,
            )
            return
    if found > t["sft_high"]:
        yield Finding(
            "first-likelihood",
            Severity.NOTE,
            f"Before training the answers are unlikely: {found:.3g} nats per token, where 0.8 to 2.5 is usual",
            Evidence.RULE,
            harmless_if="the model starts from random weights, or new tokens or another language are to be learnt",
            remedies=[
                Remedy("look at a rendered example: is it the chat template of this model? strop train --dry-run")
            ],
            thresholds=("sft_high",),
            **more,
        )
    elif found < t["sft_low"]:
        yield Finding(
            "first-likelihood",
            Severity.NOTE,
            f"Before training the answers are very likely already: {found:.3g} nats per token",
            Evidence.RULE,
            harmless_if="code or text is copied from the prompt",
            remedies=[Remedy("look at which tokens are trained: strop train --dry-run")],
            thresholds=("sft_low",),
            **more,
        )
    else:
        yield passed(
            "first-likelihood", f"Before training the answers have {found:.3g} nats per token", numbers=numbers
        )


CHECKS = (
    teacher_is_student,
    rate_is_zero,
    gradient_is_zero,
    reference_is_the_start,
    first_likelihood,
    weights_stand_still,
)
