"""One group for the eye: its text, with the tokens that are trained marked. Floor 2.

In: a group and the tokenizer. Out: a string for a terminal, with colours or with brackets. Characters that steer a
terminal are written as escapes, so that a row cannot do anything to the one that shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from strop.terminal import escaped
from strop.types import Group

LABELS = {1: ("completion",), 2: ("chosen", "rejected")}
DESIRABLE = {True: ("desirable completion",), False: ("undesirable completion",), None: None}
BRACKETS = ("\u00ab", "\u00bb")  # guillemets: rare in texts
COLOURS = ("\x1b[1;32m", "\x1b[0m")


def show_group(group: Group, tokenizer: PreTrainedTokenizerBase, *, colour: bool = False) -> str:
    """The prompt and each completion with their numbers of tokens; trained tokens stand between marks.

    Args:
        colour: mark by ANSI colours, else by guillemets.
    """
    begin, end = COLOURS if colour else BRACKETS
    prompt = list(group.prompt_ids)
    lines = [f"prompt ({len(prompt)} tokens)", _text(tokenizer, [], prompt)]
    labels = (
        DESIRABLE[group.label]
        or LABELS.get(len(group.completions))
        or [f"completion {i + 1}" for i in range(len(group.completions))]
    )
    for label, completion in zip(labels, group.completions, strict=True):
        lines.append(f"{label} ({len(completion.ids)} tokens, {completion.num_scored} trained)")
        context, text = list(prompt), ""
        for trained, run in groupby(zip(completion.loss_mask, completion.ids, strict=True), key=lambda pair: pair[0]):
            ids = [token for _, token in run]
            words = _text(tokenizer, context, ids)
            text += f"{begin}{words}{end}" if trained else words
            context += ids
        lines.append(text)
    return "\n".join(lines)


def _text(tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to that of `context`: tokenizers drop the space in front of a text of its own."""

    def decoded(tokens: Sequence[int]) -> str:
        text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # a character whose bytes lie on both sides of the cut is shown with the second
    before = decoded(context).rstrip("\ufffd") if context else ""
    return escaped(decoded([*context, *ids])[len(before) :])
