"""Examples to text: renders the chat template, and finds the row's words and the trained answers in the text. Floor 2.

In: an Example. Out: one Rendered per completion: the whole conversation as text, with character spans.

`message_forms.py` knows the forms in which templates expect messages, `markers.py` finds a row's words in the text, and
`answer_spans.py` finds the parts that the model has to write.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from strop.data.read.row import RowRefused
from strop.data.text.answer_spans import AnswerSpan, Content, Conversation
from strop.data.text.chat_template import choose_template, tokenizers_template
from strop.data.text.markers import REASONING, Span
from strop.data.text.message_forms import (
    TRAIN,
    Form,
    Tools,
    forms_of,
    has_reasoning,
    readable,
    with_thoughts_under,
    without_reasoning,
    without_thoughts,
    writes_python,
)
from strop.data.text.refusals import (
    LostReasoning,
    dropped_reasoning,
    dropped_tools,
    refuse_dropped_calls,
    refuse_dropped_tools,
    refuse_lone_surrogates,
    refuse_lost_parts,
    unverified,
)
from strop.data.text.sandbox import NOW, Bounded, are_plain, bounded_memory, variables
from strop.data.text.template_writer import Ends, Writer
from strop.errors import ConfigError
from strop.types import Example, Message, Turns

TOLD_APART = REASONING | {"role", "content"}
"""Keys of a message whose text is told apart from the template's own."""

TrainOn = Literal["all", "last", "last_and_tools"]
"""Which assistant turns of a completion are trained: see `dataset.train_on`."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    boundary: where the prompt ends. openings: where generation prompts of trained answers end, the prompt's first; no
    token lies across them. trained: what the model has to write, each span at or after the boundary, end
    tokens included. contents: what the row has written, by start; all else is the template's. starts_bare: no template
    has written a BOS token, so the tokenizer's own belongs in front.

    num_prompt_turns: messages in front of the first trained answer. num_history: answers that are not trained, since
    the template renders them otherwise than inference would. num_left_out: answers that the row says not to train.
    num_dropped_reasoning: turns whose reasoning was left out, as `dataset.on_dropped_reasoning` says.
    is_generation_prompt: the prompt is the one that inference sees. left_out: what of the row is not in the text, in
    words. has_unread_keys, has_unread_kwargs: the template does not read a key of a message, or a variable of the row.
    may_be_closed: the tokenizer's EOS token may follow an answer without an end token.
    """

    text: str
    boundary: int
    trained: tuple[Span, ...]
    contents: tuple[Content, ...]
    openings: tuple[int, ...] = ()
    starts_bare: bool = False
    num_prompt_turns: int = 0
    num_history: int = 0
    num_left_out: int = 0
    num_dropped_reasoning: int = 0
    is_generation_prompt: bool = True
    left_out: tuple[str, ...] = ()
    has_unread_keys: bool = False
    has_unread_kwargs: bool = False
    may_be_closed: bool = True


@dataclass(frozen=True, slots=True)
class TextRules:
    """What the configuration says about rendering: keys of `dataset` by their names."""

    render: Literal["auto", "chat", "raw"] = "auto"
    template: str | None = None
    train_on: TrainOn = "all"
    on_dropped_reasoning: Literal["refuse", "drop"] = "refuse"
    date: datetime.date | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class Renderer:
    """Renders examples by a chat template.

    Args:
        rules: the configuration's; `render` decides about rows of plain texts, messages always go through a template.
        stop_tokens: ids of tokens that generation stops at, besides the tokenizer's EOS token.

    Raises:
        ConfigError: the named template cannot be used.
        ModelError: the tokenizer has several templates and no default.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rules: TextRules = TextRules(), stop_tokens: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._ends = Ends(tokenizer, stop_tokens)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._control_in = lru_cache(maxsize=4096)(self._find_control)
        self.chosen = choose_template(rules.template, tokenizer)
        self.template = self.chosen.source
        added = tokenizer.added_tokens_decoder
        self._special = {i: str(token.content) for i, token in added.items() if token.special}
        in_template = {i: str(token.content) for i, token in added.items() if str(token.content) in self.template}
        self._controls = {**in_template, **self._special}
        self.wraps_text = rules.render == "chat" or (rules.render == "auto" and self.chosen.is_given)

    def _template_for(self, tools: Tools) -> str:
        if tools and self.chosen.is_the_tokenizers:
            return tokenizers_template(self._tokenizer, with_tools=True)
        return self.template

    @property
    def date(self) -> str | None:
        """What the template takes for today; None where it does not ask."""
        return str(self._rules.date) if self._rules.date is not None and NOW in self.template else None

    def identity(self) -> list[Any]:
        """All that decides what becomes of an example, besides the tokenizer."""
        rules = replace(self._rules, template=None, date=self._rules.date if self.date else None)
        return [self.template, self.wraps_text, repr(rules), sorted(self._ends.stops)]

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    def is_raw(self, example: Example) -> bool:
        """Whether the example is trained as the text that it is; a text without a prompt has no turns."""
        return isinstance(example.prompt, str) and (not self.wraps_text or not example.prompt)

    def unread_kwargs(self) -> list[str]:
        """Names under `dataset.chat_template_kwargs` that no template of this tokenizer reads.

        Raises:
            ModelError: a template takes too much time or memory to be read.
        """
        if not self._rules.chat_template_kwargs:
            return []
        templates = {self._template_for(None), self._template_for(({},))}
        with Bounded(self.chosen.name, 1), bounded_memory():
            known = frozenset[str]().union(*map(variables, templates))
        return [name for name in self._rules.chat_template_kwargs if name not in known]

    def render(self, example: Example) -> tuple[Rendered, ...]:
        """Each completion after the prompt.

        Raises:
            RowRefused: the template fails on this row, drops a part of it, or its trained spans cannot be found.
            ModelError: the template is broken, or takes too much time or memory.
            ConfigError: messages under `dataset.render: raw`.
        """
        if self.is_raw(example):
            unread = [f"chat_template_kwargs.{name}" for name in example.template_kwargs or ()]
            return tuple(_raw(str(example.prompt), str(completion), unread) for completion in example.completions)
        self._refuse_unknown_tools(example)
        prompt = _as_turns(example.prompt, "user")
        if self._rules.render == "raw":
            raise ConfigError(
                "dataset.render is raw, and the row holds messages",
                where=str(example.origin),
                expected="rows of plain texts; messages need a template",
                fix="set dataset.render: auto",
            )
        completions = [_as_turns(completion, "assistant") for completion in example.completions]
        template = self._template_for(example.tools)
        own = example.template_kwargs or {}
        more = {**self._rules.chat_template_kwargs, **own, **self._special_tokens}
        turns = [turn for part in (prompt, *completions) for turn in part]
        is_plain = are_plain(turns, example.tools)
        writer = Writer(template, self._ends, more, example.tools, self._rules.date, is_plain=is_plain)
        with Bounded(example.origin, len(turns)):
            unread = [f"chat_template_kwargs.{name}" for name in own if name not in variables(template)]
            try:
                rendered = self._sides(writer, prompt, completions)
            except LostReasoning:
                if writer.key_of_thoughts is None:
                    raise
                # Gemma 4 writes no reasoning into an answer: there the tags in contents are words, on all sides
                rendered = self._sides(writer.with_thoughts_in_contents(), prompt, completions)
        if not unread:
            return rendered
        return tuple(replace(r, left_out=(*r.left_out, *unread), has_unread_kwargs=True) for r in rendered)

    def _sides(
        self, writer: Writer, prompt: tuple[Message, ...], completions: Sequence[tuple[Message, ...]]
    ) -> tuple[Rendered, ...]:
        openings: dict[Form, str | None] = {}
        is_alone = len(completions) == 1
        return tuple(self._conversation(writer, prompt, turns, openings, is_alone=is_alone) for turns in completions)

    def _refuse_unknown_tools(self, example: Example) -> None:
        """Templates without a branch for tools fail on them in words that help nobody, or leave them out."""
        turns = [turn for part in (example.prompt, *example.completions) if not isinstance(part, str) for turn in part]
        calls = any("tool_calls" in turn for turn in turns)
        if not (calls or example.tools):
            return
        template = self._template_for(example.tools)
        for there, key, what in ((calls, "tool_calls", "tool calls"), (bool(example.tools), "tools", "tools")):
            if there and key not in template:
                raise dropped_tools(
                    f"the row has {what}, and the chat template ({self.chosen.name}) has no place for them"
                )

    def _conversation(
        self,
        writer: Writer,
        prompt: tuple[Message, ...],
        completion: tuple[Message, ...],
        openings: dict[Form, str | None],
        *,
        is_alone: bool,
    ) -> Rendered:
        """One completion after the prompt. openings: prompts as inference sees them, which the sides share. is_alone:
        there is no other side."""
        rows = prompt + completion
        wanted = self._wanted(rows, len(prompt))
        if wanted and is_alone:
            # what follows the last trained answer is no context of it, and would be history's reason; the sides of a
            # pair stay whole, for a reward model reads them
            rows = rows[: max(wanted) + 1]
        messages, dropped = self._readable(rows, writer)
        self._refuse_controls_elsewhere(messages, writer.tools)
        conversation = self._written_without_thoughts(messages, len(prompt), writer, openings, dropped)
        text = conversation.text
        answers = [answer for answer in conversation.answers if answer.message in wanted]
        spans = {answer: conversation.spans(answer) for answer in answers if not answer.is_history}
        trained = [answer for answer, own in spans.items() if own]
        if not trained:
            raise _nothing_trained(conversation, answers)
        first = trained[0]
        lost = [f"the reasoning of turn {i + 1}" for i in sorted(dropped.union(conversation.lost_reasoning))]
        unread = conversation.unread_keys()
        conversation.refuse_lost_arguments()
        refuse_lost_parts(rows, unread)
        all_trained = tuple(span for answer in trained for span in spans[answer])
        conversation.refuse_words_of_others(all_trained)
        return Rendered(
            text,
            first.start if first.as_generated else spans[first][0][0],
            all_trained,
            conversation.contents,
            openings=tuple(answer.start for answer in trained if answer.as_generated),
            num_prompt_turns=first.message,
            num_history=sum(answer.is_history for answer in answers),
            num_left_out=sum(row.get(TRAIN) is False for row in completion if row["role"] == "assistant"),
            num_dropped_reasoning=len(dropped),
            is_generation_prompt=first.as_generated,
            left_out=(*lost, *(f"{key!r} of turn {i + 1}" for i, key in unread)),
            has_unread_keys=bool(unread),
            may_be_closed=not conversation.is_followed(all_trained[-1][1]),
        )

    def _wanted(self, messages: Sequence[Message], first: int) -> set[int]:
        """Numbers of the assistant turns that the row and `dataset.train_on` want trained."""
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if self._rules.train_on != "all":
            with_calls = self._rules.train_on == "last_and_tools"
            last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
            answers = [
                i for i in answers if i == answers[-1] or (with_calls and i > last_user and "tool_calls" in messages[i])
            ]
        return {i for i in answers if messages[i].get(TRAIN) is not False}

    def _readable(self, messages: Sequence[Message], writer: Writer) -> tuple[list[Message], set[int]]:
        """The messages with their reasoning where the template looks for it, and the numbers of those that lost
        theirs."""
        keys = writer.reasoning_keys
        dropped: set[int] = set()
        if not keys and (dropped := {i for i, message in enumerate(messages) if has_reasoning(message)}):
            if self._rules.on_dropped_reasoning == "refuse":
                raise dropped_reasoning(min(dropped), None)
            messages = [without_reasoning(message) for message in messages]
        key = writer.key_of_thoughts
        read = [readable(message, keys) for message in messages]
        return read if key is None else with_thoughts_under(key, read), dropped

    def _written_without_thoughts(
        self,
        messages: list[Message],
        first: int,
        writer: Writer,
        openings: dict[Form, str | None],
        dropped: set[int],
    ) -> Conversation:
        """The conversation, under `on_dropped_reasoning: drop` without the reasoning that the template leaves out.

        Args:
            dropped: numbers of the turns that lost theirs, to which the further ones are added.
        """
        while True:
            try:
                return self._written(messages, first, writer, openings)
            except LostReasoning as lost:
                if self._rules.on_dropped_reasoning == "refuse" or lost.turn in dropped:
                    raise
                dropped.add(lost.turn)
                messages = [without_thoughts(m) if i == lost.turn else m for i, m in enumerate(messages)]

    def _written(
        self, messages: Sequence[Message], first: int, writer: Writer, openings: dict[Form, str | None]
    ) -> Conversation:
        """The conversation in the first form that the template writes as it should.

        Raises:
            RowRefused: it fails on all of them; what is wrong with the plain one.
        """
        refusals = []
        for form in forms_of(messages, writer.tools):
            formed = writer.in_form(form)
            try:
                if form not in openings:
                    openings[form] = formed.opening(messages[:first])
                conversation = Conversation(formed, messages, first, openings[form])
                refuse_lone_surrogates(conversation.text)
                refuse_dropped_calls(messages, writer.tools, conversation.text)
                refuse_dropped_tools(formed, messages, conversation.rendered)
                if not writes_python(form.of(messages), conversation.text):
                    return conversation
                refusals.append(unverified("the template writes the arguments of a call or a content as Python does"))
            except RowRefused as refusal:
                refusals.append(refusal)
                if refusal.reason not in ("template_error", "dropped_by_template"):
                    break
        # a form on which the template fails says less than one that it writes without a part of the row
        raise next((refusal for refusal in refusals if refusal.reason == "dropped_by_template"), refusals[0])

    def _find_control(self, words: str, by_assistant: bool) -> str | None:
        """A control token that the tokenizer finds in a text. by_assistant: only special ones are (see `Encoder`)."""
        ids = self._tokenizer(words, add_special_tokens=False)["input_ids"]
        controls = self._special if by_assistant else self._controls
        found = next((i for i in ids if i in controls and i != self._tokenizer.unk_token_id), None)
        return None if found is None else controls[found]

    def _refuse_controls_elsewhere(self, messages: Sequence[Message], tools: Tools) -> None:
        """Tool calls and the like are not told apart from the template's own text, so a control token in them would
        pass for the template's. The tokenizer says what is one: a normaliser makes control tokens of look-alikes."""
        parts: list[tuple[Any, bool]] = [(list(tools), False)] if tools else []
        for message in messages:
            if not message.keys() <= TOLD_APART:
                others = [value for key, value in message.items() if key not in TOLD_APART]
                parts.append((others, message["role"] == "assistant"))
        for part, by_assistant in parts:
            for words in _texts(part):
                if control := self._control_in(words, by_assistant):
                    raise RowRefused(
                        "control_token",
                        f"a tool, a tool call or another key of a message holds the control token {control!r}",
                        expected="control tokens in contents alone, where they are encoded as text",
                    )


def _nothing_trained(conversation: Conversation, wanted: Sequence[AnswerSpan]) -> RowRefused:
    if not wanted:
        return RowRefused(
            "nothing_trained",
            "no answer of the row is to be trained: the row itself or dataset.train_on leaves them out",
            expected="at least one assistant turn that is trained",
        )
    if conversation.blocks is not None:
        return RowRefused(
            "nothing_trained",
            "the {% generation %} blocks of the chat template mark nothing of this row's answers",
            expected="a block around every answer",
        )
    return unverified("no answer is rendered as inference would write it")


def _raw(prompt: str, completion: str, left_out: Sequence[str]) -> Rendered:
    text = prompt + completion
    return Rendered(
        text,
        len(prompt),
        ((len(prompt), len(text)),),
        ((0, len(text), False),),
        starts_bare=True,
        left_out=tuple(left_out),
        has_unread_kwargs=bool(left_out),
    )


def _as_turns(turns: Turns, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": turns},) if isinstance(turns, str) else turns


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
