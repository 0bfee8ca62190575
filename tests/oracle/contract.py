"""What must be trained of a conversation, worked out from transformers' own renderings alone.

Nothing here calls strop. A turn's generation prompt is the rendering of the turns before it with
`add_generation_prompt`; what the model writes from there is what the rendering that ends with the turn adds, up to the
first token at which generation stops. Under a template with {% generation %} blocks it is transformers' own mask, cut
where the generation prompt ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from oracle.families import SPECIAL, Family

Message = Mapping[str, Any]

EMPTY_THOUGHT = re.compile(r"^\s*<think>\s*</think>\n*")

REASONING = ("reasoning_content", "reasoning", "thinking")


class NotRenderedError(Exception):
    """The template fails on the conversation in every form, or drops a part of it."""


@dataclass(frozen=True)
class Turn:
    """One assistant turn. text: what of it must be trained, empty for history. opening: its generation prompt.

    is_generated: the rendering of the whole holds it as inference would have written it.
    """

    number: int
    opening: str
    text: str
    is_generated: bool


@dataclass(frozen=True)
class Expected:
    """What must be trained. prompts: ids of the prompts that inference can have seen."""

    turns: list[Turn]
    prompts: list[list[int]] = field(default_factory=list)
    by_blocks: bool = False

    @property
    def trained(self) -> list[Turn]:
        """The turns of which something must be trained: those behind their generation prompts, where there are any."""
        turns = [turn for turn in self.turns if turn.text]
        return (not self.by_blocks and [turn for turn in turns if turn.is_generated]) or turns

    @property
    def follows_its_prompt(self) -> bool:
        """Whether the first trained turn follows the generation prompt that inference would see."""
        return bool(self.trained) and self.trained[0].is_generated


class Oracle:
    """One conversation under one template of a family.

    Args:
        template: the chat template; it counts as the family's.

    Raises:
        NotRenderedError: the template writes it in no form, or not all of it.
    """

    def __init__(self, family: Family, template: str, row: Mapping[str, Any]) -> None:
        self.family, self.template, self.row = family, template, row
        self.tokenizer = family.tokenizer(template)
        self.tools = row.get("tools")
        self.variables = row.get("chat_template_kwargs", {})
        self.messages = self._form()

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """What transformers writes for these messages."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=self.tools, tokenize=False, add_generation_prompt=prompt, **self.variables
        )
        return str(text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def opening(self, number: int) -> str | None:
        """The generation prompt of a turn; None where the template has none for the turns before it."""
        try:
            return self.render(self.messages[:number], prompt=True)
        except Exception:  # noqa: BLE001 - whatever a template raises
            return None

    @cached_property
    def whole(self) -> str:
        """The text of the whole conversation."""
        return self._text(self.messages)

    @property
    def is_behind_its_prompt(self) -> bool:
        """Whether the text is not the template's rendering of the whole, but the answer behind its prompt."""
        return self.whole != self.render(self.messages)

    def _text(self, messages: Sequence[Message]) -> str:
        """The rendering, or the last answer behind the generation prompt that it follows.

        A template can leave things of earlier turns out once an answer follows. Where the generation prompt ends as
        the rendering does in front of the answer, with the same last words of the row, the answer is the same.
        """
        whole, i = self.render(messages), _numbers(messages)[-1]
        if i == 0 or re.search(r"{%-?\s*generation", self.template):
            return whole
        try:
            bare, opening = self.render(messages[:i]), self.render(messages[:i], prompt=True)
        except Exception:  # noqa: BLE001 - whatever a template raises
            return whole
        asked = opening[_common(bare, opening) :]
        if whole.startswith(opening) or not asked:
            return whole
        said = words_of(messages[i - 1]).strip()
        words = next((words for words in (said, json.dumps(said)[1:-1]) if words and words in opening), None)
        if words is None:
            return whole
        tail = opening[opening.rfind(words) :]
        at = whole.rfind(tail)
        return opening + whole[at + len(tail) :] if at >= 0 and tail.endswith(asked) else whole

    def expected(self) -> Expected:
        """What must be trained: generation blocks decide, where the template has some."""
        return self.by_blocks() if re.search(r"{%-?\s*generation", self.template) else self.plain()

    def plain(self) -> Expected:
        """What must be trained under a template without generation blocks."""
        turns = [turn for i in self._numbers() if (turn := self._turn(i)) is not None]
        return Expected(turns, self._prompts(turns))

    def by_blocks(self) -> Expected:
        """What must be trained under a template with generation blocks."""
        numbers = self._numbers()
        openings = [self.opening(i) or "" for i in numbers]
        starts = [_common(opening, self.whole) for opening in openings]
        turns = []
        blocks = self.masked()
        for i, (a, b) in enumerate(blocks):
            # the block is of the last turn whose prompt ends in front of the block's end, and is cut there
            n = max((n for n, start in enumerate(starts) if start < b), default=None)
            n = i if len(blocks) == len(numbers) else n
            if n is not None and (text := self.whole[max(a, starts[n]) : b]):
                turns.append(Turn(numbers[n], openings[n], text, self.whole.startswith(openings[n])))
        return Expected(turns, self._prompts(turns), by_blocks=True)

    def masked(self) -> list[tuple[int, int]]:
        """[start, stop) in characters of what transformers marks as the assistant's."""
        found = self.tokenizer.apply_chat_template(
            list(self.messages),
            tools=self.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.variables,
        )
        offsets = self.tokenizer(self.whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        marked = groupby(zip(offsets, found["assistant_masks"], strict=True), key=lambda pair: pair[1])
        runs = [[offset for offset, _ in run] for is_trained, run in marked if is_trained]
        return [(run[0][0], run[-1][1]) for run in runs]

    def missing(self) -> list[str]:
        """What of the row the rendering does not hold, in words; reasoning of earlier turns may be dropped."""
        return list(_missing(self.messages, self.tools, self.whole))

    def _form(self) -> list[dict[str, Any]]:
        """The messages in the first form that the template writes in full."""
        problems = []
        for form in (*self._forms_with_thoughts_moved(), *_forms(self.row["messages"])):
            try:
                text = self._text(form)
            except Exception as error:  # noqa: BLE001 - whatever a template raises
                problems.append(f"{type(error).__name__}: {error}")
                continue
            missing = list(_missing(form, self.tools, text))
            if not missing:
                return form
            problems.append("the template leaves out " + ", ".join(missing))
        raise NotRenderedError(problems[-1])

    def _forms_with_thoughts_moved(self) -> Iterator[list[dict[str, Any]]]:
        """The forms in which thoughts of contents stand under a key, where the template speaks of one and tags in
        contents mean nothing to it: it writes the same around others."""
        if not any(re.search(rf"""[.'"]{key}\b""", self.template) for key in REASONING):
            return
        content = "<think>\nhm\n</think>\n\nx"
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}] * 2
        texts = []
        for tag in ("think", "thonk"):
            form = [{**message, "content": message["content"].replace("think", tag)} for message in messages]
            try:
                texts.append(self.render(form).replace("thonk", "think"))
            except Exception:  # noqa: BLE001 - whatever a template raises
                return
        if texts[0] == texts[1] and (moved := _moved(self.row["messages"])) is not None:
            yield from _forms(moved)

    def _numbers(self) -> list[int]:
        return _numbers(self.messages)

    def _prompts(self, turns: Sequence[Turn]) -> list[list[int]]:
        first = next((turn.number for turn in Expected(list(turns)).trained), -1)
        return [self.ids(turn.opening) for turn in turns if turn.number <= first]

    def _turn(self, i: int) -> Turn | None:
        opening = self.opening(i)
        if opening is None:
            return None
        alone = self._text(self.messages[: i + 1])
        if not self.whole.startswith(opening):
            return self._behind_its_prompt(i, opening, alone)
        if not alone.startswith(opening):
            return Turn(i, opening, "", is_generated=False)
        answer, closing = self._answer(i, alone, len(opening))
        if not self.whole.startswith(opening + answer) and (empty := EMPTY_THOUGHT.match(answer)) is not None:
            # an empty think block that the template writes into the last turn alone is no word of the row
            words = answer[empty.end() :].lstrip("\n")
            behind = self.whole[len(opening) :]
            answer = behind[: len(behind) - len(behind.lstrip("\n"))] + words
        if not self.whole.startswith(opening + answer):
            return Turn(i, opening, "", is_generated=False)
        text = opening + answer
        for token in closing:
            # the template can close a turn otherwise where others follow; only what inference writes is trained
            if not (self.whole + "".join(closing)).startswith(text + token) and i != self._numbers()[-1]:
                break
            text += token
        return Turn(i, opening, text[len(opening) :], is_generated=True)

    def _answer(self, i: int, alone: str, start: int) -> tuple[str, list[str]]:
        """What the model writes from its prompt on: words, and the tokens that close them up to the one that stops."""
        words, closing = self._cut(alone[start:])
        if closing:
            return words, closing
        role = "tool" if "tool_calls" in self.messages[i] else "user"
        try:
            longer = self.render([*self.messages[: i + 1], {"role": role, "content": "x"}])
        except Exception:  # noqa: BLE001 - whatever a template raises
            longer = ""
        # the turn ends with its content, or with a call; its reasoning can be gone where a turn follows
        tail = (self.messages[i].get("content") or "").split("</think>")[-1].strip()
        tail = tail if tail and alone.rstrip().endswith(tail) else alone.rstrip()[-12:]
        at = longer.rfind(tail) + len(tail)
        header = SPECIAL.match(longer[at:].lstrip()) if tail in longer else None
        if header is not None and header[0] in self.family.stops:
            return alone[start:].rstrip(), [header[0]]
        return alone[start:].rstrip(), [self.family.ends.eos]

    def _cut(self, text: str) -> tuple[str, list[str]]:
        """The text up to its first stop token, as words and the control tokens that end it; none without a stop."""
        found = list(SPECIAL.finditer(text))
        stop = next((n for n, match in enumerate(found) if match[0] in self.family.stops), None)
        if stop is None:
            return text, []
        first = stop
        while first > 0 and found[first - 1].end() == found[first].start():
            first -= 1
        return text[: found[first].start()], [match[0] for match in found[first : stop + 1]]

    def _behind_its_prompt(self, i: int, opening: str, alone: str) -> Turn:
        """A turn that the template writes otherwise than behind its generation prompt.

        Where the content begins with what the generation prompt ends with, the content behind the prompt is the text
        that inference comes to.
        """
        header = _common(opening, alone)
        content = words_of(self.messages[i])
        is_last = i == self._numbers()[-1]
        written = opening[header:]
        if is_last and written and content.startswith(written) and "</think>" in content:
            return Turn(i, opening, content[len(written) :] + self.family.ends.eos, is_generated=True)
        answer, closing = self._answer(i, alone, header)
        if not self.whole.startswith(alone[:header] + answer):
            return Turn(i, opening, "", is_generated=False)
        return Turn(i, opening, answer + "".join(closing), is_generated=False)


def _numbers(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _moved(messages: Sequence[Message]) -> list[dict[str, Any]] | None:
    """The messages with thoughts of contents under a key; None where no content begins with one."""
    moved = [dict(message) for message in messages]
    for message in moved:
        found = re.fullmatch(r"<think>(.*?)</think>\s*(.*)", words_of(message), re.DOTALL)
        if found is not None and message["role"] == "assistant":
            message.update({"content": found[2]} | ({REASONING[0]: found[1].strip()} if found[1].strip() else {}))
    return moved if moved != messages else None


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The messages in every form that templates take: reasoning under each key, arguments as object and as JSON, and
    contents as texts or as lists of parts."""
    forms = list(_text_forms(messages))
    yield from forms
    for form in forms:
        yield [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in form
        ]


def words_of(message: Message) -> str:
    """The content as a text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _text_forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    for key in REASONING:
        for as_text in (False, True):
            for empty in ("as it is", None, ""):
                form = []
                for message in messages:
                    new = {key if name in REASONING else name: value for name, value in message.items()}
                    if "tool_calls" in new:
                        calls = new["tool_calls"]
                        if as_text:
                            calls = [
                                {
                                    **c,
                                    "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])},
                                }
                                for c in calls
                            ]
                        new["tool_calls"] = calls
                        if empty != "as it is" and not new.get("content"):
                            new["content"] = empty
                    form.append(new)
                yield form


def _missing(messages: Sequence[Message], tools: Any, text: str) -> Iterator[str]:
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, message in enumerate(messages):
        content = words_of(message)
        spoken = content.split("</think>")[-1] if message["role"] == "assistant" else content
        if spoken.strip() not in text and message["role"] != "tool":
            yield f"the content of turn {i + 1}"
        if message["role"] == "tool" and content.split('"')[3] not in text:
            yield f"the result in turn {i + 1}"
        thoughts = [message.get(key) for key in REASONING]
        if i == numbers[-1]:
            yield from (f"the reasoning of turn {i + 1}" for thought in thoughts if thought and thought not in text)
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            values = arguments.values() if isinstance(arguments, dict) else json.loads(arguments).values()
            if any(value not in text for value in values):
                yield f"a call in turn {i + 1}"
            if isinstance(arguments, dict) and str(arguments) in text:
                yield f"the JSON of a call in turn {i + 1}"
    for tool in tools or ():
        if tool["function"]["description"] not in text:
            yield "the tools"


def _common(one: str, other: str) -> int:
    """How many characters both texts begin with; a control token counts as a whole."""
    pairs = enumerate(zip(one, other, strict=False))
    length = next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
    return min((m.start() for m in SPECIAL.finditer(other) if m.start() < length < m.end()), default=length)
