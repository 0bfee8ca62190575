"""What findings advise to try, where several of them advise the same. Floor 2."""

from __future__ import annotations

from strop.config.grpo_settings import ALGORITHMS
from strop.report.facts import Facts
from strop.report.findings import RUN, Remedy

COSTS_LENGTH = Remedy("add the reward length, which costs those that come near the limit")


def look_at_step(step: float) -> Remedy:
    """What was trained on in this step."""
    words = "look at the rows of that step, their log-probs and their shares of the gradient"
    return Remedy(words, look=("replay", RUN, "--step", f"{step:.0f}", "--rows"))


FAR_ABOVE = 100
"""Times the method's own learning rate from which that is advised, and not a smaller step towards it."""


def lower(facts: Facts, factor: float) -> Remedy:
    """Divide the learning rate, or take the method's own where it is far from that."""
    if not facts.rate:
        return Remedy("lower the learning rate")
    if facts.usual_rate is not None and facts.rate > FAR_ABOVE * facts.usual_rate:
        return Remedy("take the method's own learning rate", {"training.learning_rate": _rounded(facts.usual_rate)})
    rate = _rounded(facts.rate / factor)
    return Remedy(f"divide the learning rate by {factor:g}", {"training.learning_rate": rate})


def higher(facts: Facts, factor: float) -> Remedy:
    """Multiply the learning rate."""
    if not facts.rate:
        return Remedy("raise the learning rate")
    rate = _rounded(facts.rate * factor)
    return Remedy(f"multiply the learning rate by {factor:g}", {"training.learning_rate": rate})


def longer_warmup(share: float) -> Remedy:
    return Remedy("warm up longer", {"training.warmup_steps": None, "training.warmup_ratio": share})


def longer_run(facts: Facts) -> Remedy:
    """Twice the epochs."""
    epochs = int(2 * (facts.run.number("training.num_epochs") or 1)) or 1
    return Remedy("train longer", {"training.max_steps": None, "training.num_epochs": epochs})


def fewer_steps(facts: Facts) -> Remedy:
    """One epoch, or half of the steps where their number was asked for, which decides then."""
    steps = facts.run.number("training.max_steps")
    fewer = {"training.max_steps": max(1, int(steps) // 2)} if steps else {"training.num_epochs": 1}
    return Remedy("train fewer steps", fewer)


def longer_rows(facts: Facts, words: str) -> Remedy:
    """Twice every length limit: the configuration of the run has them all, and the lowest one cuts."""
    names = [f"training.max_{part}_length" for part in ("seq", "prompt", "completion")]
    return Remedy(words, {name: int(2 * limit) for name in names if (limit := facts.run.number(name))})


def by_algorithm(facts: Facts, words: str, algorithm: str) -> Remedy:
    """Another algorithm of grpo, with what it stands for: the configuration of the run has a value on each axis, and
    such a value wins over the algorithm's. What the run does not read stays unread."""
    axes = {f"post_training.{axis}": value for axis, value in ALGORITHMS[algorithm].items()}
    if axes.get("post_training.aggregation", "constant") != "constant":
        axes["post_training.normalizer_length"] = None  # which other aggregations do not read
    read = {key: value for key, value in axes.items() if facts.run.value(key) is not None}
    return Remedy(words, {"post_training.algorithm": algorithm, **read})


def times_beta(facts: Facts, factor: float, words: str) -> list[Remedy]:
    """Another beta; nothing where the run does not say which it has."""
    return [Remedy(words, {"post_training.beta": _rounded(facts.beta * factor)})] if facts.beta else []


def weaker(facts: Facts) -> list[Remedy]:
    """What holds the policy closer to where it began, in the order to try."""
    beta = times_beta(facts, 3, "raise beta threefold") if facts.has_reference else []
    return [lower(facts, 3), *beta, fewer_steps(facts)]


def anchored(facts: Facts) -> list[Remedy]:
    """What holds the chosen side up, for the methods that have such a term."""
    if facts.method not in ("dpo", "simpo"):
        return []
    weight = facts.run.number("post_training.sft_weight") or 0.0
    return [Remedy("add the likelihood of the chosen side", {"post_training.sft_weight": max(0.2, 2 * weight)})]


def smoothed(facts: Facts, share: float) -> list[Remedy]:
    """Take this share of the labels to be flipped, for the losses that can."""
    if facts.method != "dpo" or facts.loss_type not in ("sigmoid", "robust"):
        return []
    return [Remedy("tell the loss how noisy the labels are", {"post_training.label_smoothing": share})]


def _rounded(value: float) -> float:
    """Three digits: 5e-6, not 4.9999999999999996e-06."""
    return float(f"{value:.3g}")
