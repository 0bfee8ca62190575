"""Markers: private-use characters around a row's words, by which they are found in a rendered conversation. Floor 2.

In: messages. Out: the same messages with markers; and, from a rendering of these, the text without markers and the
place of every marked piece in it.

Contents, reasoning and names of called tools are marked. An answer with `<think>` and `</think>` is marked in pieces
between these tags, because templates split such answers there. Markers are placed inside of the white space at the ends
of a piece, so that a template may trim the piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from strop.types import Message

Span = tuple[int, int]
"""[start, stop) in characters."""

OuterTags = Sequence[tuple[str, str]]
"""Texts at the beginning and the end of a content: see `Markers`."""

Kind = Literal["content", "thought", "reasoning", "call"]
"""What a piece is: a content (or what of it stands outside of `<think>` tags), what stands between these tags, a text
under a key of its own for reasoning, or the name of a called tool."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which rows and templates have the reasoning of an assistant turn."""

REASONING = frozenset(REASONING_KEYS)

THOUGHTS = ("thought", "reasoning")
"""Kinds of pieces that are reasoning."""

THINK_TAG = re.compile(r"(</?think>)")

PLANES = ((0xF0000, re.compile("([\U000f0000-\U000ffffd])")), (0x100000, re.compile("([\U00100000-\U0010fffd])")))
"""First mark and all marks of the two private-use planes: where a text holds a character of one, the other serves."""

MOST_PIECES = 0xFFFE // 2


class MarkedText(NamedTuple):
    """A marked text. message: number of its message."""

    message: int
    kind: Kind
    text: str


class MarkedSpan(NamedTuple):
    """Where a rendering has put a piece: [start, stop) in the text without marks. A piece can stand more than once."""

    start: int
    stop: int
    piece: MarkedText


@dataclass(frozen=True)
class MarkedRendering:
    """A marked rendering, read.

    text: without marks. places: in order of their starts. is_whole: every mark that opens is closed.
    """

    text: str
    places: tuple[MarkedSpan, ...]
    is_whole: bool

    def of(self, message: int) -> list[MarkedSpan]:
        """The places of one message's pieces, in order."""
        return self._by_message.get(message, [])

    @cached_property
    def _by_message(self) -> dict[int, list[MarkedSpan]]:
        found: dict[int, list[MarkedSpan]] = {}
        for place in self.places:
            found.setdefault(place.piece.message, []).append(place)
        return found


class Markers:
    """One conversation with marks around its pieces.

    Args:
        spares_empty: thoughts without a word get no marks, since templates ask whether there is a thought.
        by_id: calls are marked in their ids, where these hold the names.
        outer_tags: texts, opening and closing, by which a template knows a tool's result in the turn of a user. They
            stay outside of the marks, and so they are the template's own.

    messages: the marked messages. pieces: what is marked, and thoughts that are spared.
    """

    def __init__(
        self,
        base: int,
        pattern: re.Pattern[str],
        messages: Sequence[Message],
        *,
        spares_empty: bool = False,
        by_id: bool = False,
        outer_tags: OuterTags = (),
    ) -> None:
        self._base, self._pattern = base, pattern
        self._spares_empty, self._by_id, self._outer_tags = spares_empty, by_id, outer_tags
        self.pieces: list[MarkedText] = []
        self.messages = tuple(self._marked_message(i, message) for i, message in enumerate(messages))

    @classmethod
    def put(
        cls,
        messages: Sequence[Message],
        text: str,
        *,
        spares_empty: bool = False,
        by_id: bool = False,
        outer_tags: OuterTags = (),
    ) -> Markers | None:
        """The messages with marks that their rendering `text` does not hold; None where there are none to be had."""
        plane = next((plane for plane in PLANES if not plane[1].search(text)), None)
        if plane is None:
            return None
        markers = cls(*plane, messages, spares_empty=spares_empty, by_id=by_id, outer_tags=outer_tags)
        return None if len(markers.pieces) > MOST_PIECES else markers

    def again(self, messages: Sequence[Message], text: str) -> Markers | None:
        """Other messages marked in the same way, but for empty thoughts."""
        return self.put(messages, text, by_id=self._by_id, outer_tags=self._outer_tags)

    @classmethod
    def ways(cls, messages: Sequence[Message], text: str, outer_tags: OuterTags) -> Iterator[Markers]:
        """The ways to mark the messages, to be tried in order: a template may ask for what a mark changes, or write
        calls by their ids alone (Kimi K2)."""
        first = cls.put(messages, text, outer_tags=outer_tags)
        if first is None:
            return
        yield first
        has_empty = any(piece.kind == "thought" and not piece.text for piece in first.pieces)
        has_ids = any(_has_name_in_id(call) for message in messages for call in message.get("tool_calls", ()))
        for spares_empty, by_id in ((True, False), (False, True), (True, True)):
            if (spares_empty and not has_empty) or (by_id and not has_ids):
                continue  # nothing would change
            markers = cls.put(messages, text, spares_empty=spares_empty, by_id=by_id, outer_tags=outer_tags)
            if markers is not None:
                yield markers

    def read(self, rendered: str) -> MarkedRendering:
        """Reads a rendering of (the first of) the marked messages."""
        parts = self._pattern.split(rendered)  # text, mark, text, mark, ..., text
        text, marks = "".join(parts[::2]), "".join(parts[1::2])
        positions = list(accumulate(map(len, parts[:-1:2])))  # of each mark, in the text without marks
        if self._in_order.startswith(marks) and len(marks) % 2 == 0:  # as most templates write them
            return MarkedRendering(text, tuple(map(MarkedSpan, positions[::2], positions[1::2], self.pieces)), True)
        places: list[MarkedSpan] = []
        opened: dict[int, int] = {}
        is_whole = True
        for position, mark in zip(positions, marks, strict=True):
            number, closes = divmod(ord(mark) - self._base, 2)
            if number >= len(self.pieces) or bool(closes) != (number in opened):
                is_whole = False
            elif closes:
                places.append(MarkedSpan(opened.pop(number), position, self.pieces[number]))
            else:
                opened[number] = position
        places.sort(key=itemgetter(0, 1))
        return MarkedRendering(text, tuple(places), is_whole and not opened)

    def missing_in(self, reading: MarkedRendering) -> list[MarkedText]:
        """The pieces that stand nowhere in a rendering."""
        written = [place.piece for place in reading.places]
        if written == self.pieces:
            return []  # as most templates write them
        seen = set(map(id, written))
        return [piece for piece in self.pieces if id(piece) not in seen]

    @cached_property
    def _in_order(self) -> str:
        """All marks, each piece closed before the next one is opened."""
        return "".join(map(chr, range(self._base, self._base + 2 * len(self.pieces))))

    @cached_property
    def has_thoughts(self) -> bool:
        """Whether a piece is reasoning, between tags or under a key of its own."""
        return any(piece.kind in THOUGHTS for piece in self.pieces)

    def _marked_message(self, i: int, message: Message) -> Message:
        """The message with marks; what is empty stays as it is, for templates ask for that. Only an empty answer is
        marked, to know where it stands."""
        answers = message["role"] == "assistant"
        changed: dict[str, Any] = {}
        content = message.get("content")
        if isinstance(content, str) and answers and THINK_TAG.search(content):
            changed["content"] = self._marked_thoughts(i, content)
        elif self._outer_tags and isinstance(content, str) and (tags := self._around(message["role"], content)):
            changed["content"] = self._marked_inside(i, content, *tags)
        elif isinstance(content, str) and (content.strip() or (answers and "tool_calls" not in message)):
            changed["content"] = self._marked(i, "content", content)
        for key in REASONING_KEYS if answers else ():
            if isinstance(message.get(key), str) and message[key].strip():
                changed[key] = self._marked(i, "reasoning", message[key])
        if "tool_calls" in message:
            changed["tool_calls"] = [self._marked_call(i, call) for call in message["tool_calls"]]
        return {**message, **changed}

    def _around(self, role: str, content: str) -> tuple[str, str] | None:
        """The tags around the content of a user's turn by which the template takes it for the result of a tool."""
        words = content.strip() if role == "user" else ""
        return next((tags for tags in self._outer_tags if words.startswith(tags[0]) and words.endswith(tags[1])), None)

    def _marked_inside(self, i: int, content: str, opening: str, closing: str) -> str:
        """A content marked between its tags, since a mark in front of them would hide them from the template. Several
        results stand one behind the other."""
        start, stop = content.index(opening) + len(opening), content.rindex(closing)
        parts = re.split(rf"({re.escape(closing)}\s*{re.escape(opening)})", content[start:stop])
        parts[::2] = [self._marked(i, "content", part) for part in parts[::2]]
        return content[:start] + "".join(parts) + content[stop:]

    def _marked_thoughts(self, i: int, content: str) -> str:
        """An answer with `<think>` tags, each text between two tags marked by itself: a thought ends at `</think>`."""
        parts = THINK_TAG.split(content)  # text, tag, text, tag, ..., text
        if "</think>" not in parts and not any(text.strip() for text in parts[::2]):
            return self._marked(i, "content", content)  # tags that open nothing are all that it says
        for n in range(0, len(parts), 2):
            kind: Kind = "thought" if parts[n + 1 : n + 2] == ["</think>"] else "content"
            if parts[n].strip() or (kind == "thought" and not self._spares_empty):
                parts[n] = self._marked(i, kind, parts[n])
            elif kind == "thought":
                self.pieces.append(MarkedText(i, kind, ""))
        return "".join(parts)

    def _marked_call(self, i: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            return call
        if self._by_id and _has_name_in_id(call):
            return {**call, "id": self._marked(i, "call", call["id"])}
        function = {**function, "name": self._marked(i, "call", function["name"])}
        return {**call, "function": function} if "function" in call else function

    def _marked(self, message: int, kind: Kind, text: str) -> str:
        start = self._base + 2 * len(self.pieces)
        core = text.strip()
        self.pieces.append(MarkedText(message, kind, core))
        if len(core) == len(text):
            return f"{chr(start)}{text}{chr(start + 1)}"
        left, right = text.split(core, 1) if core else ("", text)
        return f"{left}{chr(start)}{core}{chr(start + 1)}{right}"


def _has_name_in_id(call: Mapping[str, Any]) -> bool:
    """Whether the id of a call says which function it calls, as `functions.add:0` does."""
    function, number = call.get("function", call), call.get("id")
    name = function.get("name") if isinstance(function, Mapping) else None
    return isinstance(name, str) and isinstance(number, str) and name in number
