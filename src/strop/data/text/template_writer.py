"""Writes conversations by a chat template, and knows the tokens that end an answer. Floor 2.

In: messages as a template takes them. Out: their rendering.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

from strop.data.read.row import RowRefused
from strop.data.text.markers import Span
from strop.data.text.message_forms import (
    PLAIN_FORM,
    Form,
    Tools,
    looks_for_thoughts,
    names_arguments,
    outer_tags,
    reasoning_keys,
)
from strop.data.text.sandbox import render
from strop.types import Message


class Ends:
    """The control tokens of a tokenizer, and those of them that generation stops at.

    Args:
        stop_tokens: ids of tokens that generation stops at, besides the tokenizer's EOS token.

    `stops_elsewhere`: there are such tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int] = ()) -> None:
        eos = str(tokenizer.eos_token)
        known = (token for token in stop_tokens if 0 <= token < len(tokenizer))  # models have ids without a token
        self.stops = frozenset({eos, *(str(tokenizer.convert_ids_to_tokens(token)) for token in known)})
        self.stops_elsewhere = bool(self.stops - {eos})
        self.controls = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._ends_of_answers = tuple(self.controls)
        longest_first = sorted(map(re.escape, self.controls), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")

    def closing(self, behind: str, *, ends_with_a_header: bool) -> int:
        """How many of the characters behind an answer's last words are the answer's too: those up to the token that
        generation stops at, else up to the last control token.

        Args:
            ends_with_a_header: the template writes the next answer's header at the end, so it is the first one.
        """
        found = list(self._control.finditer(behind))
        stop = next((match for match in found if match[0] in self.stops), None)
        if stop is None and found:
            stop = found[0 if ends_with_a_header else -1]
        return stop.end() if stop is not None else len(behind.rstrip())

    def first_control(self, text: str) -> int:
        """Where the first control token of `text` begins; its length where there is none."""
        match = self._control.search(text)
        return match.start() if match is not None else len(text)

    def last_control(self, text: str) -> int:
        """Where the last control token of `text` ends; 0 where there is none."""
        return max((match.end() for match in self._control.finditer(text)), default=0)

    def is_closed(self, answer: str) -> bool:
        """Whether an answer ends with a control token."""
        return answer.endswith(self._ends_of_answers)

    def next_header(self, behind: str) -> int:
        """How many characters behind an answer without an end token belong to it: those of the next turn's first token,
        if generation stops at it."""
        match = self._control.match(behind, len(behind) - len(behind.lstrip()))
        return match.end() if match is not None and match[0] in self.stops else 0


class Writer:
    """Writes conversations by one chat template.

    Args:
        variables: what the template may read besides messages and tools: the tokenizer's special tokens by the names
            that templates use (`bos_token`), and those of the configuration and the row.
        tools: those of the row.
        date: what the template takes for today.
        form: how the template takes messages.
        is_plain: messages and tools are (`are_plain`).

    `asks_for_answers`: the template knows a generation prompt. `reasoning_keys`: where it looks for reasoning.
    `key_of_thoughts`: where it wants thoughts that a row has between tags in a content; None where it may write them as
    they are. `outer_tags`: tags by which it knows the result of a tool in a user's turn. `names_arguments`: it speaks
    of the arguments of calls.
    """

    def __init__(
        self,
        template: str,
        ends: Ends,
        variables: Mapping[str, Any],
        tools: Tools = None,
        date: datetime.date | None = None,
        form: Form = PLAIN_FORM,
        *,
        is_plain: bool = False,
    ) -> None:
        self._template, self.ends, self.tools, self._form = template, ends, tools, form
        self._variables = dict(variables)
        self._date, self._is_plain = date, is_plain
        self.reasoning_keys = reasoning_keys(template)
        self.key_of_thoughts = None if looks_for_thoughts(template) else next(iter(self.reasoning_keys), None)
        self.outer_tags = outer_tags(template)
        self.names_arguments = names_arguments(template)
        self.asks_for_answers = "add_generation_prompt" in template

    def in_form(self, form: Form) -> Writer:
        """The same writer for this form of messages."""
        if form == self._form:
            return self
        other = copy(self)
        other._form = form
        return other

    def with_thoughts_in_contents(self) -> Writer:
        """The same writer for a row whose contents keep their thoughts."""
        other = copy(self)
        other.key_of_thoughts = None
        return other

    def without_tools(self) -> Writer:
        """The same writer for a row without tools."""
        other = copy(self)
        other.tools = None
        return other

    def text(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The rendering."""
        return self._render(messages, generation_prompt=generation_prompt)[0]

    def tracked(self, messages: Sequence[Message]) -> tuple[str, list[Span] | None]:
        """The rendering and the spans of its generation blocks; None where the template knows none."""
        return self._render(messages, track=True)

    def _render(self, messages: Sequence[Message], **how: bool) -> tuple[str, list[Span] | None]:
        formed = self._form.of(messages)
        tools = self._form.of_tools(self.tools)
        return render(self._template, formed, tools, self._variables, is_plain=self._is_plain, date=self._date, **how)

    def opening(self, messages: Sequence[Message]) -> str | None:
        """The prompt that inference sees; None where the template cannot write one for these messages."""
        try:
            return self.text(messages, generation_prompt=True) if messages else ""
        except RowRefused:
            return None
