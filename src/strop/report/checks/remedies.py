"""What findings advise to try, where several of them advise the same. Floor 2."""

from __future__ import annotations

from strop.report.facts import Facts
from strop.report.findings import RUN, Remedy

COSTS_LENGTH = Remedy("add the reward length, which costs those that come near the limit")
FEWER_STEPS = Remedy("train fewer steps", {"training.num_epochs": 1})


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


def longer_rows(facts: Facts, words: str) -> Remedy:
    """Twice the length limit."""
    limit = facts.run.number("training.max_seq_length")
    return Remedy(words, {"training.max_seq_length": int(2 * limit)} if limit else {})


def times_beta(facts: Facts, factor: float, words: str) -> list[Remedy]:
    """Another beta; nothing where the run does not say which it has."""
    return [Remedy(words, {"post_training.beta": _rounded(facts.beta * factor)})] if facts.beta else []


def weaker(facts: Facts) -> list[Remedy]:
    """What holds the policy closer to where it began, in the order to try."""
    beta = times_beta(facts, 3, "raise beta threefold") if facts.has_reference else []
    return [lower(facts, 3), *beta, FEWER_STEPS]


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
