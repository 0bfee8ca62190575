"""Single rows for the eye: which to show, what of each is left out, its text with the trained tokens marked. Floor 2.

In: the configuration or the table of tokens. Out: groups with what was left out, and a string for a terminal, with
colours or with brackets. Characters that steer a terminal are written as escapes, so that a row cannot do anything to
the one that shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig
from strop.data.read.sources import choose_sources
from strop.data.store.row_pipeline import RowPipeline
from strop.data.store.table import Groups
from strop.terminal import escaped
from strop.types import Completion, Group, Origin, RowShape

PAIR = ("chosen", "rejected")
DESIRABLE = {True: ("desirable completion",), False: ("undesirable completion",), None: None}
BRACKETS = ("\u00ab", "\u00bb")  # guillemets: rare in texts
COLOURS = ("\x1b[1;32m", "\x1b[0m")

MOST_CHARACTERS = 1200
"""Of a stretch of text, where it is abridged; its middle is left out."""

ODD = {
    ("prompts_cut", "completions_cut"): "cut to fit",
    ("without_end_token",): "without an end token",
    ("answers_as_history", "answers_left_out"): "with answers that are not trained",
    ("reasoning_dropped",): "without its reasoning, which the template cannot write",
    ("controls_as_text",): "with control tokens in its words, which stay text",
    ("with_tools",): "with tools",
    ("with_reasoning",): "with reasoning",
    ("message_keys_unread", "template_kwargs_unread"): "with keys that the chat template does not read",
    ("trailing_turns", "system_unused", "media_unread", "reasoning_unread"): "of which strop leaves a part out",
    ("other_prompts",): "whose prompt is not the one that inference sees",
}
"""Counters of a row -> what is odd about it."""


LOOKED_AT = 16
"""Rows among which `first_row` finds one."""


@dataclass(frozen=True)
class SeenRow:
    """A row by itself. group: as it is trained. left_out: what of it is not in its tokens, in words."""

    group: Group
    left_out: tuple[str, ...]


def first_row(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: RowShape, stop_tokens: Sequence[int] = ()
) -> SeenRow | None:
    """The first training row as it is trained, before the others are read; None where that is none of the first few.
    What is wrong with them is said by `load_data`."""
    source = choose_sources(config.dataset, rows).train[0]
    pipeline = RowPipeline(config, tokenizer, rows, stop_tokens)
    for row in islice((source.read_lines or source.read)(), LOOKED_AT):
        done = pipeline.work([row])
        if done.first is not None:
            return SeenRow(done.first, done.left_out)
    return None


def left_out(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowShape,
    origins: Collection[Origin],
    stop_tokens: Sequence[int] = (),
) -> dict[Origin, tuple[str, ...]]:
    """What of some training rows is not in their tokens, in words. The table of tokens does not hold it, so the sources
    are read once more, up to the last of these rows; streams are not."""
    pipeline = RowPipeline(config, tokenizer, rows, stop_tokens)
    found: dict[Origin, tuple[str, ...]] = {}
    for source in choose_sources(config.dataset, rows).train:
        if source.is_stream:
            continue
        for row in (source.read_lines or source.read)():
            if len(found) == len(origins):
                return found
            if row.origin in origins:
                found[row.origin] = pipeline.work([row]).left_out
    return found


def odd_groups(groups: Groups) -> list[tuple[str, int]]:
    """The longest group and, of each oddity, the shortest: what is odd, and the group's number, by number."""
    if not len(groups):
        return []
    lengths = groups.lengths.prompt + groups.lengths.sums(groups.lengths.completions)
    found = {int(lengths.argmax()): ["the longest"]}
    for names, words in ODD.items():
        is_odd = np.any([groups.column(name) > 0 for name in names], axis=0)
        if is_odd.any():
            shortest = int(np.where(is_odd, lengths, lengths.max() + 1).argmin())
            found.setdefault(shortest, []).append(words)
    return [("; ".join(words), number) for number, words in sorted(found.items())]


def show_group(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: RowShape = "pair",
    colour: bool = False,
    whole: bool = True,
) -> str:
    """The prompt and each completion with their numbers of tokens; trained tokens stand between marks.

    Args:
        rows: the shape that the group is of: what its completions are called, and whether they are shown.
        colour: mark by ANSI colours, else by guillemets.
        whole: all of it, or long stretches without their middle.
    """
    shown = str if whole else _abridged
    begin, end = COLOURS if colour else BRACKETS
    prompt = list(group.prompt_ids)
    lines = [f"prompt ({len(prompt)} tokens; inference begins at its end)", shown(_text(tokenizer, [], prompt))]
    if rows == "prompt":
        return "\n".join(lines)
    labels = DESIRABLE[group.label] or _names(len(group.completions), rows)
    for label, completion in zip(labels, group.completions, strict=True):
        counts = f"{len(completion.ids)} tokens, {completion.num_scored} trained"
        lines.append(f"{label} ({counts}; {_stop(completion, tokenizer)})")
        context, text = list(prompt), ""
        for trained, run in groupby(zip(completion.loss_mask, completion.ids, strict=True), key=lambda pair: pair[0]):
            ids = [token for _, token in run]
            words = shown(_text(tokenizer, context, ids))
            text += f"{begin}{words}{end}" if trained else words
            context += ids
        lines.append(text)
    return "\n".join(lines)


def _names(num_completions: int, rows: RowShape) -> Sequence[str]:
    """What the completions of a group without a label are called."""
    if rows == "pair" and num_completions == len(PAIR):
        return PAIR
    return ["completion"] if num_completions == 1 else [f"completion {i + 1}" for i in range(num_completions)]


def _stop(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """Where generation will stop, in words."""
    last = tokenizer.added_tokens_decoder.get(completion.ids[-1])
    if last is None or not completion.loss_mask[-1]:
        return "no token to stop at"
    return f"generation stops at {escaped(str(last.content))}"


def _abridged(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _text(tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to that of `context`: tokenizers drop the space in front of a text of its own."""

    def decoded(tokens: Sequence[int]) -> str:
        text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # a character whose bytes lie on both sides of the cut is shown with the second
    before = decoded(context).rstrip("\ufffd") if context else ""
    return escaped(decoded([*context, *ids])[len(before) :])
