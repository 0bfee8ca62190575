"""Where the answers of a conversation lie in its rendering, and which of them are trained. Floor 2.

In: messages as a template takes them. Out: the rendering, with a span for each answer that is trained.

An answer is all that the model has to write: it begins where the generation prompt for the turns before it ends, and it
stops with the control token that generation stops at. So it is trained only where the rendering of the whole begins
with that generation prompt and holds all that the row says. An earlier turn that the template renders otherwise (it
drops the reasoning of earlier turns, say) is history: context, and not trained. Generation blocks of a template decide
instead, cut at the end of the generation prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

from strop.data.read.row import RowRefused
from strop.data.text.generation_prompt import behind_prompt, num_alike, num_common, with_thoughts
from strop.data.text.markers import (
    MOST_PIECES,
    REASONING_KEYS,
    THOUGHTS,
    MarkedRendering,
    MarkedSpan,
    MarkedText,
    Markers,
    Span,
)
from strop.data.text.message_forms import without_arguments, without_thoughts
from strop.data.text.refusals import dropped, dropped_arguments, dropped_reasoning, unverified
from strop.data.text.template_writer import Writer
from strop.types import Message

Content = tuple[int, int, bool]
"""What the row has written: start, stop, and whether it is an assistant turn."""

KNOWN = frozenset({"role", "content", "tool_calls", "tool_call_id"})
"""Keys of any message that are looked after one by one; an id says nothing but what belongs together."""

EMPTY: tuple[object, ...] = ("", [], {})

MOST_TURNS = 2000
"""Each answer is rendered with all turns before it, so the work grows with the square of their number."""


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """One assistant turn of the completion. message: its number. start, stop: in the rendering. earliest: where a
    generation block of it may begin.

    as_generated: the rendering up to `start` is the prompt that inference sees. is_history: the template renders it
    otherwise than inference would, since other turns follow. lost_thoughts: without thoughts that inference wrote
    there, so it is history.
    """

    message: int
    start: int
    stop: int
    earliest: int
    as_generated: bool
    is_history: bool
    lost_thoughts: bool = False


class Conversation:
    """A prompt and its continuation, rendered.

    Args:
        first: number of the first message behind the prompt.
        opening: the prompt as inference sees it, where the caller has it.

    Raises:
        RowRefused: the template fails on these messages or drops a part of them, or answers cannot be found.
    """

    def __init__(self, writer: Writer, messages: Sequence[Message], first: int, opening: str | None = None) -> None:
        if len(messages) > MOST_TURNS:
            raise unverified(f"it has {len(messages)} turns, and each answer is rendered with all turns before it")
        self._writer, self._ends = writer, writer.ends
        self._messages, self._first = messages, first
        self._numbers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        self.text, self.blocks = writer.tracked(messages)
        self.rendered = self.text
        self._openings: dict[int, str | None] = {} if opening is None else {first: opening}
        self._markers, self._reading = self._read()
        if self._reading is None:
            self._refuse_controls_in_contents()
        elif not self.blocks:
            self._restore_thoughts()
            self._begin_with_the_prompt()
        self._refuse_dropped()
        self.answers = [self._answer(i) for i in self._numbers]
        if self.blocks is None:
            self.answers = [self._closed_by_next_header(answer) for answer in _with_history(self.answers)]
            self._refuse_an_open_end()
        else:
            self.answers = [replace(a, is_history=False) if a.is_history else a for a in self.answers]

    @cached_property
    def contents(self) -> tuple[Content, ...]:
        """What the row has written but for its calls, by start; all else is the template's."""
        places = self._reading.places if self._reading is not None else ()
        return tuple(
            (place.start, place.stop, self._messages[place.piece.message]["role"] == "assistant")
            for place in places
            if place.piece.kind != "call"
        )

    @property
    def lost_reasoning(self) -> list[int]:
        """Numbers of the turns whose reasoning the template leaves out, as it does at inference."""
        if self._markers is None or not self._markers.has_thoughts:
            return []
        pieces, reading = self._markers.pieces, self._reading
        gone = self._markers.missing_in(reading) if reading else [p for p in pieces if p.text not in self.text]
        return sorted({piece.message for piece in gone if piece.kind in THOUGHTS and piece.text})

    def unread_keys(self) -> list[tuple[int, str]]:
        """Keys of messages, with the number of their message, without which the template writes the same."""
        more = [
            (i, key)
            for i, message in enumerate(self._messages)
            if not message.keys() <= KNOWN
            for key, value in message.items()
            if value not in EMPTY and not self._is_looked_after(key, value, message["role"])
        ]
        if not more or self._writes_without(more):
            return more
        return [one for one in more if self._writes_without([one])]

    def refuse_lost_arguments(self) -> None:
        """A template that writes calls without their arguments would train calls that nobody has made."""
        if self._writer.names_arguments:
            return
        bare = without_arguments(self._messages)
        if bare != list(self._messages) and self._writer.text(bare) == self.rendered:
            raise dropped_arguments()

    def _is_looked_after(self, key: str, value: object, role: str) -> bool:
        is_tools_name = (key, role) == ("name", "tool") and str(value) in self.text  # its call has it
        return key in KNOWN or is_tools_name or (role == "assistant" and key in REASONING_KEYS)

    def _writes_without(self, keys: Sequence[tuple[int, str]]) -> bool:
        gone = set(keys)
        messages = [{k: v for k, v in m.items() if (i, k) not in gone} for i, m in enumerate(self._messages)]
        try:
            return self._writer.text(messages) == self.rendered
        except RowRefused:
            return False

    def spans(self, answer: AnswerSpan) -> list[Span]:
        """What is trained of an answer: its generation blocks, or else all of it."""
        if self.blocks is None:
            return [(answer.start, answer.stop)]
        own = [(max(a, answer.earliest), b) for a, b in self.blocks if self._owner(b) is answer]
        return [(a, b) for a, b in own if a < b]

    def refuse_words_of_others(self, spans: Sequence[Span]) -> None:
        """What somebody else has written is never trained, whatever a generation block holds.

        Args:
            spans: what is trained, in order.
        """
        starts = [start for start, _ in spans]
        for start, stop, is_assistants in self.contents:
            n = bisect_left(starts, stop) - 1
            if not is_assistants and n >= 0 and start < stop and spans[n][1] > start:
                raise RowRefused(
                    "spans_not_found",
                    f"what is trained would hold {self.text[start:stop][:40]!r}, which no assistant turn says",
                    expected="{% generation %} blocks around what the assistant writes, and nothing else",
                    fix="fix the chat template, or set dataset.template to another one",
                )

    def is_followed(self, stop: int) -> bool:
        """Whether the template writes more behind a generation block that ends there: then the block says where the
        answer ends."""
        return self.blocks is not None and bool(self.text[stop:].strip())

    def _owner(self, stop: int) -> AnswerSpan | None:
        """The last answer that starts before `stop`, where the block ends."""
        return next((answer for answer in reversed(self.answers) if answer.start < stop), None)

    def _read(self) -> tuple[Markers | None, MarkedRendering | None]:
        """Marks, and the rendering with them; no rendering where marks change what the template writes.

        Raises:
            RowRefused: the template leaves a content or a call out.
        """
        found: list[tuple[int, Markers, MarkedRendering]] = []
        for markers in Markers.ways(self._messages, self.text, self._writer.outer_tags):
            reading = markers.read(self._writer.text(markers.messages))
            is_right = reading.is_whole and reading.text == self.text
            num_missing = sum(p.kind == "call" for p in markers.missing_in(reading)) if is_right else MOST_PIECES
            if num_missing == 0:
                return markers, reading
            found.append((num_missing, markers, reading))
        if not found:
            return None, None
        num_missing, markers, reading = min(found, key=itemgetter(0))
        if num_missing < MOST_PIECES:
            return markers, reading
        self._refuse_if_dropped([piece for piece in markers.missing_in(reading) if piece.text not in self.text])
        return markers, None

    def _refuse_dropped(self) -> None:
        if self._reading is not None and self._markers is not None:
            self._refuse_if_dropped(self._markers.missing_in(self._reading))

    def _refuse_if_dropped(self, gone: Sequence[MarkedText]) -> None:
        if piece := next((piece for piece in gone if piece.kind in ("content", "call")), None):
            raise dropped(self._messages, piece)

    def _refuse_controls_in_contents(self) -> None:
        for i, message in enumerate(self._messages):
            texts = [value for value in message.values() if isinstance(value, str)]
            if control := next((c for c in self._ends.controls if any(c in text for text in texts)), None):
                raise unverified(f"turn {i + 1} holds the control token {control!r}, which only marks could tell apart")

    def _restore_thoughts(self) -> None:
        """Puts the content of the last turn, whose thoughts the template drops, behind the generation prompt."""
        assert self._reading is not None and self._markers is not None
        if not self._markers.has_thoughts:
            return
        i = len(self._messages) - 1
        thoughts = [p for p in self._markers.pieces if p.message == i and p.kind in THOUGHTS]
        if not thoughts:
            return
        seen = {id(place.piece) for place in self._reading.of(i)}
        if i < self._first or all(id(piece) in seen for piece in thoughts):
            return
        opening = self._opening_at(i)
        probed = [*self._messages[:-1], {**self._messages[i], "content": "x"}]
        markers = self._markers.again(probed, self.text)
        if opening is None or markers is None or any(piece.kind == "reasoning" for piece in thoughts):
            raise dropped_reasoning(i, opening)
        probe = markers.read(self._writer.text(markers.messages))
        content = self._messages[i].get("content", "")
        restored = with_thoughts(probe, content, opening, i)
        if restored is None:
            if any(piece.text for piece in thoughts):
                raise dropped_reasoning(i, opening)
            return
        self.text, self._reading, self._markers = restored.text, restored, markers

    def _begin_with_the_prompt(self) -> None:
        """Puts the last answer behind its generation prompt, where the template renders earlier turns otherwise."""
        assert self._reading is not None and self._markers is not None
        i = len(self._messages) - 1
        opening = self._opening_at(i)
        if i < self._first or opening is None or self.text.startswith(opening):
            return
        try:
            prompt = self._markers.read(self._writer.text(self._markers.messages[:i], generation_prompt=True))
        except RowRefused:
            return
        found = behind_prompt(self._reading, prompt, i) if prompt.text == opening else None
        if found is not None:
            self.text, self._reading = found.text, found

    def _opening_at(self, i: int) -> str | None:
        if i not in self._openings:
            self._openings[i] = self._writer.opening(self._messages[:i])
        return self._openings[i]

    def _answer(self, i: int) -> AnswerSpan:
        opening = self._opening_at(i)
        alone = self._alone(i)
        own = self._reading.of(i) if self._reading is not None else []
        own_alone = alone.of(i) if alone is not None else []
        if not own or not own_alone or alone is None or self._reading is None:
            return self._answer_without_marks(i, opening)
        self._refuse_lost_reasoning(i, own_alone)
        pieces, all_pieces = [place.piece for place in own], [place.piece for place in own_alone]
        lost = self._lacks_thoughts(i, own_alone) or (
            pieces != all_pieces and any(p.kind in THOUGHTS and p not in pieces for p in all_pieces)
        )
        own = own[: len(own_alone)]  # templates repeat the name of a call where they write its result
        end = own[-1].stop
        length, is_whole = self._ending(self.text[end:], alone.text[own_alone[-1].stop :])
        others = (p.stop for p in self._reading.places if p.piece.message != i and p.start < own[0].start)
        floor = max(others, default=0)
        as_generated = opening is not None and self.text.startswith(opening)
        opening = opening or ""
        common = len(opening) if as_generated else num_alike(opening, self.text, floor)
        if as_generated and opening:
            start = earliest = len(opening)
        else:
            begin = max(own[0].start - len(self._lead(i, own[0])), floor)
            start = min(common, own[0].start) if common >= floor > 0 else begin
            earliest = start if common >= floor > 0 else floor
        if not floor <= start <= end + length:
            raise unverified(f"turn {i + 1} does not follow its generation prompt")
        # the prompt at inference is like the rendering that ends with this turn for longer than like that of the whole
        is_other = not as_generated and num_alike(opening, alone.text, floor) > common
        is_history = pieces[: len(own)] != all_pieces or not is_whole or is_other or lost
        return AnswerSpan(i, start, end + length, earliest, as_generated, is_history, lost)

    def _lacks_thoughts(self, i: int, own_alone: Sequence[MarkedSpan]) -> bool:
        """Whether the template drops thoughts of an earlier turn, though it ends with them: inference wrote them."""
        return i != len(self._messages) - 1 and self._lacks(i, own_alone, "thought")

    def _lacks(self, i: int, places: Sequence[MarkedSpan], *kinds: str) -> bool:
        """Whether a piece of turn `i` that is of these kinds, of thoughts, and no empty one stands in none of these
        places."""
        assert self._markers is not None
        if not self._markers.has_thoughts:
            return False
        seen = {id(place.piece) for place in places}
        return any(p.message == i and p.kind in kinds and p.text and id(p) not in seen for p in self._markers.pieces)

    def _lead(self, i: int, first: MarkedSpan) -> str:
        """What a content has in front of its first piece, a tag or white space, if the rendering has it there too."""
        content = self._messages[i].get("content") or ""
        own = first.piece.kind in ("content", "thought")
        at = content.find(first.piece.text) if first.piece.text else content.find("<think>") + len("<think>")
        lead = content[:at] if own else ""
        return lead if self.text.endswith(lead, 0, first.start) else ""

    def _closing(self, behind: str) -> int:
        """How many of the characters behind an answer's last words are the answer's too."""
        return self._ends.closing(behind, ends_with_a_header=not self._writer.asks_for_answers)

    def _alone(self, i: int) -> MarkedRendering | None:
        """The marked rendering that ends with turn `i`, as inference would write it; None where there is none."""
        if i == len(self._messages) - 1:
            return self._reading
        if self._markers is None:
            return None
        try:
            return self._markers.read(self._writer.text(self._markers.messages[: i + 1]))
        except RowRefused:
            return None

    def _ending(self, behind: str, alone: str) -> tuple[int, bool]:
        """How much of the text behind an answer's last words is the answer's, and whether the words are all there.

        Args:
            behind: that text in the rendering of the whole. alone: in that of the turns up to this one. They can end
                by other control tokens; what inference would not write is not trained.
        """
        wanted = alone[: self._closing(alone)]
        length = num_common(behind, wanted)
        if length == len(wanted):
            return length, True
        words = self._ends.first_control(wanted)
        return max(self._ends.last_control(wanted[:length]), min(words, length)), length >= words

    def _refuse_lost_reasoning(self, i: int, own_alone: Sequence[MarkedSpan]) -> None:
        is_last = i == len(self._messages) - 1
        if self._lacks(i, own_alone, "reasoning", *(("thought",) if is_last else ())):
            raise dropped_reasoning(i, self._opening_at(i))

    def _answer_without_marks(self, i: int, opening: str | None) -> AnswerSpan:
        """An answer in which nothing could be marked, as what its turn adds to the generation prompt."""
        is_last = i == len(self._messages) - 1
        pieces = self._markers.pieces if self._markers is not None else []
        if is_last and any(p.message == i and p.kind == "reasoning" and p.text not in self.text for p in pieces):
            raise dropped_reasoning(i, opening)
        try:
            alone = self.text if is_last else self._writer.text(self._messages[: i + 1])
        except RowRefused:
            alone = ""
        if opening is not None and alone.startswith(opening):
            stop = len(opening) + self._closing(alone[len(opening) :])
            if len(opening) < stop and self.text.startswith(alone[:stop]):
                content = self._messages[i].get("content") or ""
                # without a prompt there is no generation prompt, and the header is no part of the answer
                start = len(opening) if i else max(self.text.find(content.strip(), 0, stop), 0)
                return AnswerSpan(i, start, stop, start, as_generated=True, is_history=False)
        if i != self._numbers[-1]:
            return AnswerSpan(i, 0, 0, 0, as_generated=False, is_history=True)
        raise unverified(f"turn {i + 1} is not rendered behind its generation prompt")

    def _following_header(self) -> str:
        """The first token of what would follow the last turn, where generation stops at it; else nothing."""
        role = "tool" if "tool_calls" in self._messages[-1] else "user"
        # with another turn behind them the last ones would lose their reasoning
        messages = [without_thoughts(m) if m["role"] == "assistant" else m for m in self._messages]
        try:
            short = self._writer.text(messages).rstrip()
            long = self._writer.text([*messages, {"role": role, "content": "x"}])
        except RowRefused:
            return ""
        if not long.startswith(short):
            return ""
        return long[len(short) :][: self._ends.next_header(long[len(short) :])]

    def _refuse_an_open_end(self) -> None:
        """Where the last answer is not trained, since it does not follow its generation prompt, the one before it needs
        an end token of its own: the tokenizer's would teach it to stop where the template goes on."""
        trained = [answer for answer in self.answers if not answer.is_history]
        if trained and self.answers[-1].is_history and not self._is_closed(trained[-1]):
            number = self.answers[-1].message + 1
            raise unverified(f"turn {number} does not follow its generation prompt, and earlier ones do")

    def _is_closed(self, answer: AnswerSpan) -> bool:
        return self._ends.is_closed(self.text[answer.start : answer.stop])

    def _closed_by_next_header(self, answer: AnswerSpan) -> AnswerSpan:
        """The answer up to the first token of the next turn, where it has no end token and generation stops there."""
        if answer.is_history or self._is_closed(answer):
            return answer
        if answer.message == len(self._messages) - 1 and self._ends.stops_elsewhere:
            self.text = self.text[: answer.stop] + self._following_header()
        length = self._ends.next_header(self.text[answer.stop :])
        return replace(answer, stop=answer.stop + length) if length else answer


def _with_history(answers: Sequence[AnswerSpan]) -> list[AnswerSpan]:
    """The answers, where those that do not follow their generation prompt are history if others do follow theirs."""
    # an answer at the very beginning has no generation prompt to follow
    if not any(answer.as_generated and answer.message and not answer.lost_thoughts for answer in answers):
        return list(answers)
    return [
        answer if answer.as_generated or answer.is_history else replace(answer, is_history=True) for answer in answers
    ]
