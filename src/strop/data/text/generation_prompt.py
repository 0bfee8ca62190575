"""How much of a generation prompt a rendering has, and a last answer behind its prompt where it has not all. Floor 2.

In: a rendering, read by its marks, which does not begin with the generation prompt of its last answer. Out: that prompt
with the answer behind it, where this is provably the text that inference comes to; else nothing.
"""

from __future__ import annotations

import re

from strop.data.text.markers import MarkedRendering, MarkedSpan

OPEN_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
"""A tag that is not closed."""

CLOSE = "</think>"
"""What ends thoughts."""


def behind_prompt(whole: MarkedRendering, prompt: MarkedRendering, number: int) -> MarkedRendering | None:
    """The generation prompt, with what the rendering of the whole has behind it.

    Templates leave things of earlier turns out once an answer follows, and inference has seen them: gpt-oss the
    reasoning in front of a call, Mistral Nemo the system text. The answer is the same where the prompt ends alike in
    both: the same words are the last, and what the prompt has behind these stands in the whole in front of the answer.

    Args:
        whole: the marked rendering of the conversation. prompt: that of the generation prompt of its last turn.
        number: of that turn.
    """
    own = whole.of(number)
    if not prompt.is_whole or not prompt.places or not own:
        return None
    last = max(prompt.places, key=_stop)
    before = max(
        (p for p in whole.places if p.piece.message < number and p.stop <= own[0].start), key=_stop, default=None
    )
    if before is None or before.piece is not last.piece:
        return None
    tail = prompt.text[last.stop :]
    start = before.stop + len(tail)
    if start > own[0].start or not whole.text.startswith(tail, before.stop):
        return None
    by = len(prompt.text) - start
    moved = tuple(place._replace(start=place.start + by, stop=place.stop + by) for place in own)
    return MarkedRendering(prompt.text + whole.text[start:], prompt.places + moved, is_whole=True)


def _stop(place: MarkedSpan) -> int:
    return place.stop


def with_thoughts(probe: MarkedRendering, content: str, opening: str, number: int) -> MarkedRendering | None:
    """The content of the last turn, whose thoughts the template drops, behind the generation prompt.

    That is the text that inference comes to: the template puts an answer without thoughts into the same place, and the
    content begins with what the generation prompt writes there already, or where that ends: inside of the thoughts.
    Where the generation prompt opens thoughts, a template may close them in front of an answer without any (DeepSeek
    V3.1); the content closes them itself.

    Args:
        probe: the marked rendering with a short word in place of the content. content: the content.
        opening: the generation prompt. number: of the last turn.
    """
    words = probe.of(number)
    if not probe.is_whole or len(words) != 1:
        return None
    start, stop = words[0].start, words[0].stop
    in_front = probe.text[:start].rstrip()
    if in_front.endswith(CLOSE) and not opening.startswith(in_front):
        start = len(in_front) - len(CLOSE)
    written = opening[start:]
    if not opening.startswith(probe.text[:start]):
        return None
    before = tuple(place for place in probe.places if place.stop <= start and place is not words[0])
    if CLOSE in opening[max(map(_stop, before), default=0) :]:
        return None  # the generation prompt has closed the thoughts: inference writes none behind them
    if not content.startswith(written):
        if "<think>" not in written or "<think>" in content.partition(CLOSE)[0]:
            return None
        start += len(written)
    place = words[0]._replace(start=start, stop=start + len(content))
    text = (opening if start == len(opening) else probe.text[:start]) + content + probe.text[stop:]
    return MarkedRendering(text, (*before, place), is_whole=True)


def num_alike(opening: str, text: str, least: int) -> int:
    """How much of a generation prompt a rendering begins with, in whole tags: `<think>` is not like `<tool_call>`.

    Args:
        least: where somebody's words end; they may hold anything.
    """
    length = num_common(opening, text)
    tag = OPEN_TAG.search(text, min(least, length), length)
    return tag.start() if tag is not None and length < len(opening) else length


def num_common(one: str, other: str) -> int:
    """How many characters both texts begin with, by bisection: slices are compared faster than characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
