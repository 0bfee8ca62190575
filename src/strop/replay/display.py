"""A step that was taken again, as lines for a terminal, and as a value for programs. Floor 8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from strop.replay.retake import AFTER, Replayed, Retaken
from strop.replay.row_scores import CompletionScores, RowScores
from strop.report.ledgers import WORDS
from strop.terminal import escaped

LEVELS = ((-0.1, "green"), (-0.7, "default"), (-2.3, "yellow"), (-4.6, "red"))
"""Log-probs down to which a token has a colour: probabilities of 90, 50, 10 and 1 %. Below: bold red."""
MOST_PROMPT = 400
"""Characters of a prompt that are shown, those at its end."""
MOST_TOKENS = 400
"""Tokens of a completion that are shown."""


def as_json(found: Replayed) -> dict[str, Any]:
    """All of it, for programs."""
    return {**asdict(found), "same": found.first_difference is None}


def lines(found: Replayed) -> Iterator[Text]:
    """What the replay found, then the rows."""
    origin = f"checkpoint-{found.start}" if found.start else "the initial model"
    many = found.step - found.start
    yield Text(f"step {found.step}, taken again from {origin} ({many} {'step' if many == 1 else 'steps'})")
    line = found.line
    yield Text(
        f"  {len(line['rows'])} rows in {len(line['cut'])} micro-batches, learning rate {line['learning_rate']:g}, "
        f"loss {line['loss']}, gradient norm {line['grad_norm']}"
    )
    yield from _verdict(found)
    if found.masks_differ:
        then, now = found.processes
        yield Text(
            f"  {then} {'process' if then == 1 else 'processes'} took this step, and {now} did now: the masks of "
            "lora_dropout are others, so the numbers differ by more than rounding"
        )
    if found.resumed is not None and found.first_difference is not None:
        yield Text(
            f"  the run was resumed after step {found.resumed}, and config.yaml is of then: a setting that had "
            "changed, such as the length of the run, which decides the learning rate, is not that of this step"
        )
    for change in found.environment:
        yield Text(f"  changed since the launch, so the last digits may differ: {escaped(change)}")
    for number, row in enumerate(found.rows, start=1):
        yield from _row(number, row)


def _verdict(found: Replayed) -> Iterator[Text]:
    parted = found.first_difference
    if parted is None:
        after = ", and so are the weights after it" if found.has_after else ""
        yield Text(f"the same as in the run, to the last bit{after}", "green")
        return
    yield Text(f"not the same as in the run: step {parted.step} is the first that differs, in", "bold red")
    yield from _differences(parted)


def _differences(step: Retaken) -> Iterator[Text]:
    for name, was in step.recorded.items():
        what = "weights after the step" if name == AFTER else WORDS[name]
        yield Text(f"  {what}: {_short(was)} then, {_short(step.found[name])} now")


def _short(value: Any) -> str:
    text = str(value)
    return escaped(text if len(text) <= 80 else text[:77] + "...")


def _row(number: int, row: RowScores) -> Iterator[Text]:
    beside = [f"{row.share:.1%} of the gradient"]
    if row.margin is not None:
        beside.insert(0, f"margin {row.margin:+.3f}")
    yield Text("")
    yield Text(escaped(f"row {number}: {row.source} ({row.hash}), {', '.join(beside)}"), "bold")
    cut = "..." if len(row.prompt) > MOST_PROMPT else ""
    yield Text(escaped(f"  prompt: {cut}{row.prompt[-MOST_PROMPT:]}"), "dim")
    names = ("chosen", "rejected") if row.margin is not None else _names(row)
    for name, completion in zip(names, row.completions, strict=True):
        yield _about(name, completion)
        yield _tokens(completion)


def _names(row: RowScores) -> Sequence[str]:
    if row.label is not None:
        return ("desirable" if row.label else "undesirable",)
    many = len(row.completions) > 1
    return [f"completion {n}" if many else "completion" for n in range(1, len(row.completions) + 1)]


def _about(name: str, completion: CompletionScores) -> Text:
    parts = []
    if completion.logp is not None:
        trained = sum(logp is not None for logp in completion.logps)
        parts.append(f"log-prob {completion.logp:.3f} ({completion.logp / max(1, trained):.3f} per token)")
    if completion.ref_logp is not None:
        parts.append(f"reference {completion.ref_logp:.3f}")
    if completion.reward is not None:
        parts.append(f"reward {completion.reward:+.4f}")
    return Text(f"  {name}: {', '.join(parts)}")


def _tokens(completion: CompletionScores) -> Text:
    """The tokens, each coloured by its log-prob; the log-prob itself stands behind those below 50 %, so that nothing is
    told by colour alone."""
    text = Text("    ")
    for token, logp in list(zip(completion.tokens, completion.logps, strict=True))[:MOST_TOKENS]:
        shown = escaped(token).replace("\n", "\\n")
        if logp is None:
            text.append(shown, "dim")
            continue
        text.append(shown, next((style for least, style in LEVELS if logp >= least), "bold red"))
        if logp < LEVELS[1][0]:
            text.append(f"[{logp:.1f}]", "dim")
    if (left := len(completion.tokens) - MOST_TOKENS) > 0:
        text.append(f" ... {left} more tokens")
    return text
