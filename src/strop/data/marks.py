"""Marks: private-use characters around contents, by which a rendering shows where it has put them. Floor 2.

In: messages. Out: the same messages with marked contents; and from a marked rendering the text without marks, the
span of each message's content in it, and the spans of generation blocks moved to it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from strop.types import Message

Span = tuple[int, int]
"""[start, stop) in characters."""

PLANES = ((0xF0000, re.compile("([\U000f0000-\U000ffffd])")), (0x100000, re.compile("([\U00100000-\U0010fffd])")))
"""First mark and all marks of the two private-use planes: where a text holds a character of one, the other serves."""


@dataclass(frozen=True)
class Unmarked:
    """A marked rendering, read.

    text: without marks. spans: message number -> where its content stands, if both marks stand once and in order.
    seen: messages of which any mark is there. _marks: where the marks stood, in the marked text.
    """

    text: str
    spans: dict[int, Span]
    seen: frozenset[int]
    _marks: tuple[int, ...]

    def moved(self, spans: Sequence[Span]) -> list[Span]:
        """Spans of the marked text as spans of `text`."""
        return [(a - bisect_left(self._marks, a), b - bisect_left(self._marks, b)) for a, b in spans]


class Marks:
    """The marks for one conversation."""

    def __init__(self, base: int, pattern: re.Pattern[str]) -> None:
        self._base, self._pattern = base, pattern

    @classmethod
    def unused_in(cls, text: str, num_messages: int) -> Marks | None:
        """Marks that `text` does not hold; None where it holds some of every plane."""
        free = (plane for plane in PLANES if not plane[1].search(text))
        plane = next(free, None) if 2 * num_messages <= 0xFFFE else None
        return None if plane is None else cls(*plane)

    def put(self, messages: Sequence[Message], *, outside: bool) -> list[Message]:
        """The messages with marks around their contents: outside or inside of white space at the contents' ends.

        Empty contents stay as they are, for templates ask for them; only an empty answer is marked, to know where it
        stands. What is not marked is the same object.
        """
        return [self._put(message, self._base + 2 * i, outside) for i, message in enumerate(messages)]

    def _put(self, message: Message, start: int, outside: bool) -> Message:
        content = message.get("content")
        if content is None or (not content and (message["role"] != "assistant" or "tool_calls" in message)):
            return message
        core = content if outside else content.strip()
        left, right = content.split(core, 1) if core else ("", content)
        return {**message, "content": f"{left}{chr(start)}{core}{chr(start + 1)}{right}"}

    def take(self, rendered: str) -> Unmarked:
        """Reads a rendering of marked messages."""
        pieces = self._pattern.split(rendered)  # text, mark, text, mark, ..., text
        at: dict[int, list[int]] = {}
        marks: list[int] = []
        position = 0
        for text, mark in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(text)
            at.setdefault(ord(mark) - self._base, []).append(position)
            marks.append(position + len(marks))
        spans = {}
        for number, starts in at.items():
            stops = at.get(number + 1, [])
            if number % 2 == 0 and len(starts) == len(stops) == 1 and starts[0] <= stops[0]:
                spans[number // 2] = (starts[0], stops[0])
        return Unmarked("".join(pieces[::2]), spans, frozenset(number // 2 for number in at), tuple(marks))
