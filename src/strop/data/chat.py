"""Examples to text: renders the chat template and finds the row's words and the trained spans in it. Floor 2.

In: an Example. Out: one Rendered for each completion: the whole conversation as text, with character spans.

Where a template puts a message is found by marks: every content is wrapped in characters of a private-use plane, the
conversation is rendered, and the marks are taken out again. The spans count only if what is left equals the plain
rendering, so a template that looks into contents cannot mislead. Where marks do not work (a tool call in place of a
content, a template that rewrites contents) a trained turn is what its rendering adds to that of the turns before it,
if both are beginnings of the whole; where that does not hold either, the row is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from strop.data.marks import Marks, Span
from strop.data.rows import RowRefused
from strop.data.sandbox import bounded, render
from strop.data.template import choose_template, tokenizers_template
from strop.errors import ConfigError
from strop.types import Example, Message, Turns

Content = tuple[int, int, bool]
"""What the row has written: start, stop, and whether it is an assistant turn."""

Tools = Sequence[Mapping[str, Any]] | None

MOST_PREFIXES = 1000
"""Turns of a conversation whose answers marks cannot tell: each is rendered with all before it."""

WRITES_MORE = frozenset({"tool_calls", "reasoning_content", "reasoning", "thinking"})
"""Keys of an assistant turn that a template renders besides its content."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    boundary: where the prompt ends. trained: the assistant's words, each at or after the boundary. contents: what the
    row has written, by start; all else is the template's. starts_bare: no template has written a BOS token, so the
    tokenizer's own belongs in front.
    """

    text: str
    boundary: int
    trained: tuple[Span, ...]
    contents: tuple[Content, ...]
    starts_bare: bool = False


class Renderer:
    """Renders examples by a chat template.

    Args:
        mode: `dataset.render`; decides about rows of plain texts, messages always go through a template.
        template: `dataset.template`; null: the tokenizer's, or the built-in one.

    Raises:
        ConfigError: the named template cannot be used.
        ModelError: the tokenizer has several templates and no default.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mode: Literal["auto", "chat", "raw"],
        template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._mode = mode
        self._controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = dict(tokenizer.special_tokens_map)
        self.chosen = choose_template(template, tokenizer)
        self.template = self.chosen.source
        self.wraps_text = mode == "chat" or (mode == "auto" and self.chosen.is_given)

    def _template_for(self, tools: Tools) -> str:
        if tools and self.chosen.is_the_tokenizers:
            return tokenizers_template(self._tokenizer, with_tools=True)
        return self.template

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    def is_raw(self, example: Example) -> bool:
        """Whether the example is trained as the text that it is; a text without a prompt has no turns."""
        return isinstance(example.prompt, str) and (not self.wraps_text or not example.prompt)

    def render(self, example: Example) -> tuple[Rendered, ...]:
        """Each completion after the prompt.

        Raises:
            RowRefused: the template fails on this row, drops a part of it, or its trained spans cannot be found.
            ModelError: the template is broken, or takes too much time or memory.
            ConfigError: messages under `dataset.render: raw`.
        """
        if self.is_raw(example):
            return tuple(_raw(str(example.prompt), str(completion)) for completion in example.completions)
        self._refuse_unknown_tools(example)
        prompt = _as_turns(example.prompt, "user")
        if self._mode == "raw":
            raise ConfigError(
                "dataset.render is raw, and the row holds messages",
                where=str(example.origin),
                expected="rows of plain texts; messages need a template",
                fix="set dataset.render: auto",
            )
        completions = [_as_turns(completion, "assistant") for completion in example.completions]
        with bounded(str(example.origin), len(prompt) + sum(map(len, completions))):
            opening = self._text(prompt, example.tools, generation_prompt=True) if prompt else ""
            return tuple(self._conversation(prompt, turns, opening, example.tools) for turns in completions)

    def _refuse_unknown_tools(self, example: Example) -> None:
        """Templates without a branch for tools fail on them in words that help nobody, or leave them out."""
        turns = [turn for part in (example.prompt, *example.completions) if not isinstance(part, str) for turn in part]
        calls = any("tool_calls" in turn for turn in turns)
        if not (calls or example.tools):
            return
        template = self._template_for(example.tools)
        for there, key, what in ((calls, "tool_calls", "tool calls"), (bool(example.tools), "tools", "tools")):
            if there and key not in template:
                raise RowRefused(
                    "dropped_by_template",
                    f"the row has {what}, and the chat template ({self.chosen.name}) has no place for them",
                    expected="a chat template that writes tools, or rows without them",
                    fix="set dataset.template: qwen2.5_instruct, or to a template of your own that writes tools",
                )

    def _conversation(
        self, prompt: tuple[Message, ...], completion: tuple[Message, ...], opening: str, tools: Tools
    ) -> Rendered:
        messages = prompt + completion
        text = self._text(messages, tools)
        _refuse_lone_surrogates(text)
        _refuse_dropped_calls(messages, tools, text)
        self._refuse_controls_elsewhere(messages, tools)
        boundary = len(opening) if opening and text.startswith(opening) else None
        found = self._by_marks(messages, len(prompt), text, boundary, tools)
        if found is None:
            found = self._by_prefix(messages, len(prompt), text, tools), ()
        trained, contents = found
        start = trained[0][0] if boundary is None else boundary
        clipped = tuple((max(a, start), b) for a, b in trained if b >= start)
        if not clipped:
            raise _unverified("no part of the answer follows the generation prompt")
        return Rendered(text, start, clipped, contents)

    def _by_marks(
        self, messages: Sequence[Message], first: int, text: str, boundary: int | None, tools: Tools
    ) -> tuple[tuple[Span, ...], tuple[Content, ...]] | None:
        """Trained spans and contents of `text`; None where marks do not work."""
        marks = Marks.unused_in(text, len(messages))
        if marks is None:
            return None
        for outside in (True, False):
            # a template that trims contents trims no marks: then they go inside of the white space
            marked = marks.put(messages, outside=outside)
            wrapped = [i for i, message in enumerate(messages) if marked[i] is not message]
            rendered, blocks = self._tracked(marked, tools)
            read = marks.take(rendered)
            verified = read.text == text
            unseen = (i for i in wrapped if i not in read.seen)
            _refuse_dropped(messages, [i for i in unseen if verified or not _stands(messages[i], text)])
            if verified:
                break
        else:
            return None
        spans = read.spans
        if any(i not in spans for i in wrapped):
            return None
        contents = tuple(sorted((*spans[i], messages[i]["role"] == "assistant") for i in wrapped))
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        own = [spans[i] for i in answers if i in spans and not WRITES_MORE & messages[i].keys()]
        # a system text can stand in a user turn behind the first answer
        early = (spans[i][1] for i in wrapped if i < first and (not own or spans[i][1] <= own[0][0]))
        floor = max(early, default=0) if boundary is None else boundary
        blocks = [block for block in read.moved(blocks) if floor <= block[0] < block[1]]
        if len(blocks) >= len(answers) and all(any(a <= s and t <= b for a, b in blocks) for s, t in own):
            return tuple(blocks), contents
        if len(own) < len(answers):
            return None
        return _with_lead(text, boundary, own), contents

    def _refuse_controls_elsewhere(self, messages: Sequence[Message], tools: Tools) -> None:
        """Tool calls and the like are not marked, so a control token in them would pass for the template's."""
        others = [value for m in messages for key, value in m.items() if key not in ("role", "content")]
        for words in _texts([others, list(tools or ())]):
            if control := next((c for c in self._controls if c in words), None):
                raise RowRefused(
                    "control_token",
                    f"a tool, a tool call or another key of a message holds the control token {control!r}",
                    expected="control tokens in contents alone, where they are encoded as text",
                )

    def _by_prefix(self, messages: Sequence[Message], first: int, text: str, tools: Tools) -> tuple[Span, ...]:
        """The trained spans as what each assistant turn adds to the rendering of the turns before it."""
        for i, message in enumerate(messages):
            if control := next((c for c in self._controls if c in message.get("content", "")), None):
                raise _unverified(
                    f"turn {i + 1} holds the control token {control!r}, which only marks could tell apart"
                )
        if len(messages) > MOST_PREFIXES:
            raise _unverified(f"it has {len(messages)} turns, too many to render every beginning of")
        spans = []
        for i in range(first, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            before = self._text(messages[:i], tools, generation_prompt=True) if i else ""
            after = self._text(messages[: i + 1], tools)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise _unverified(f"turn {i + 1} is rendered differently when turns follow it")
            start = len(before)
            if not WRITES_MORE & messages[i].keys():
                # a template without a generation prompt has its header here; an answer that it rewrites is taken whole
                start = max(start, text.find(messages[i]["content"].strip(), start, len(after)))
            spans.append((start, start + len(text[start : len(after)].rstrip())))
        return tuple(spans)

    def _text(self, messages: Sequence[Message], tools: Tools, *, generation_prompt: bool = False) -> str:
        template = self._template_for(tools)
        return render(template, messages, tools, self._special, generation_prompt=generation_prompt)[0]

    def _tracked(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        """The rendering and the spans of its generation blocks."""
        return render(self._template_for(tools), messages, tools, self._special, track=True)


def _raw(prompt: str, completion: str) -> Rendered:
    text = prompt + completion
    return Rendered(text, len(prompt), ((len(prompt), len(text)),), ((0, len(text), False),), starts_bare=True)


def _as_turns(turns: Turns, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": turns},) if isinstance(turns, str) else turns


def _with_lead(text: str, boundary: int | None, spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans with the white space that the template puts between the generation prompt and an answer.

    The model has to write it itself, so it is trained, in every turn.
    """
    lead = text[boundary : spans[0][0]] if boundary is not None else ""
    if not lead or not lead.isspace():
        return tuple(spans)
    return tuple((a - len(lead) if text.endswith(lead, 0, a) else a, b) for a, b in spans)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _stands(message: Message, text: str) -> bool:
    return str(message["content"]).strip() in text


def _refuse_dropped(messages: Sequence[Message], dropped: Sequence[int]) -> None:
    if dropped:
        role = messages[dropped[0]]["role"]
        raise RowRefused(
            "dropped_by_template",
            f"the chat template leaves turn {dropped[0] + 1}, a {role} turn, out",
            expected=f"a chat template that renders {role} turns, or rows without them",
        )


def _refuse_dropped_calls(messages: Sequence[Message], tools: Tools, text: str) -> None:
    """Tool calls and tools are not marked (templates serialise them), but their names have to be there."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    for kind, items in (("a tool call", calls), ("a tool", tools or ())):
        for item in items:
            function = item.get("function", item)
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(name, str) and name not in text:
                raise RowRefused(
                    "dropped_by_template",
                    f"the chat template leaves {kind}, {name[:40]!r}, out",
                    expected="a chat template that knows tools, or rows without them",
                )


def _refuse_lone_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused(
            "lone_surrogate",
            "the rendered conversation holds half a surrogate pair",
            expected="text that can be written as UTF-8",
        ) from error


def _unverified(problem: str) -> RowRefused:
    return RowRefused(
        "spans_not_found",
        f"where the answers lie in the rendering cannot be told: {problem}",
        expected="a chat template with {% generation %} blocks, or one that renders every turn as it is",
    )
