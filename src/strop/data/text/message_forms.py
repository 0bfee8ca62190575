"""How the messages of a row are handed to a chat template. Floor 2.

In: messages as rows have them. Out: the same under the keys that a template reads, and the forms in which it may take
them.

Templates differ in the key under which they look for reasoning, in whether the arguments of a tool call are an object
or its JSON as text, in whether the content beside a call is null, empty or absent, and in whether contents are texts or
lists of parts, and in whether tools and calls stand in {"type": "function", "function": ...} or are that function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from strop.data.text.markers import REASONING, REASONING_KEYS, THINK_TAG
from strop.types import Message

TRAIN = "train"
"""Key of a turn that is false where the row says that the turn is not to be trained; no template sees it."""

Tools = Sequence[Mapping[str, Any]] | None
"""Tool schemas of a row."""

THOUGHT_AT_THE_BEGINNING = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)

LOOKS_FOR_THOUGHTS = re.compile(
    r"""['"]</?think>['"]\s*(?:not\s+)?in\b | \w\(\s*['"]</?think>['"] | =\s*['"]</?think>['"]""", re.VERBOSE
)
"""Templates with such a tag in a question, as what a function is given, or as the value of a variable."""

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@lru_cache
def reasoning_keys(template: str) -> tuple[str, ...]:
    """The keys under which a template looks for reasoning."""
    source = COMMENT.sub("", template)
    return tuple(key for key in REASONING_KEYS if re.search(rf"""(?:\.|['"]){key}\b(?!['"]?\s*:)""", source))


@lru_cache
def looks_for_thoughts(template: str) -> bool:
    """Whether a template asks for `<think>` tags in contents; many write such tags and do not ask for any."""
    return LOOKS_FOR_THOUGHTS.search(COMMENT.sub("", template)) is not None


@lru_cache
def outer_tags(template: str) -> tuple[tuple[str, str], ...]:
    """Pairs of tags that a template looks for at the beginning and the end of a content: Qwen3 takes the turn of a user
    between `<tool_response>` and `</tool_response>` for the result of a tool, and so for no new question."""
    source = COMMENT.sub("", template)
    closing = dict.fromkeys(re.findall(r"""endswith\(\s*['"](</[^<>'"]+>)['"]""", source))
    pairs = [(tag.replace("</", "<", 1), tag) for tag in closing]
    return tuple(pair for pair in pairs if re.search(rf"""startswith\(\s*['"]{re.escape(pair[0])}['"]""", source))


@lru_cache
def names_arguments(template: str) -> bool:
    """Whether a template speaks of the arguments of calls, outside of its comments."""
    return "arguments" in COMMENT.sub("", template)


def has_reasoning(message: Message) -> bool:
    """Whether a turn has reasoning under a key of its own; white space is none."""
    # most turns have none of these keys, and every turn of every row is asked
    return (
        not REASONING.isdisjoint(message)
        and message["role"] == "assistant"
        and any((message.get(key) or "").strip() for key in REASONING_KEYS)
    )


def reasons(message: Message) -> bool:
    """Whether a turn has reasoning, under a key of its own or between tags in its content."""
    content = message.get("content")
    return has_reasoning(message) or (
        message["role"] == "assistant" and isinstance(content, str) and "<think>" in content
    )


def without_reasoning(message: Message) -> Message:
    """The turn without what stands under a key for reasoning."""
    return {key: value for key, value in message.items() if key not in REASONING_KEYS}


def without_thoughts(message: Message) -> Message:
    """The turn without reasoning, under a key of its own or between tags in its content."""
    content = message.get("content")
    words = THINK_TAG.split(content)[-1].strip() if isinstance(content, str) else content
    return {**without_reasoning(message), "content": words}


def thought_and_words(content: str) -> tuple[str, str] | None:
    """The thought with which a content begins, up to its only `</think>`, and the words behind it; else None."""
    found = THOUGHT_AT_THE_BEGINNING.fullmatch(content)
    return None if found is None or any(map(THINK_TAG.search, found.groups())) else (found[1].strip(), found[2])


def with_thoughts_under(key: str, messages: Sequence[Message]) -> list[Message]:
    """The messages, with the thoughts between `<think>` tags at the beginning of contents under a key. An empty one
    says nothing: templates ask whether there is a thought."""
    return [_with_thought_under(key, message) if message["role"] == "assistant" else message for message in messages]


def _with_thought_under(key: str, message: Message) -> Message:
    content = message.get("content")
    if key in message or not isinstance(content, str) or not content.lstrip().startswith("<think>"):
        return message
    parts = thought_and_words(content)
    if parts is None:
        return message
    thought, words = parts
    return {**message, **({key: thought} if thought else {}), "content": words}


def readable(message: Message, keys: Sequence[str]) -> Message:
    """The turn with its reasoning under the key that the template reads, and without strop's own key."""
    if REASONING.isdisjoint(message):
        return message if TRAIN not in message else {key: value for key, value in message.items() if key != TRAIN}
    found = next((key for key in REASONING_KEYS if message.get(key)), None)
    if found is not None and keys and found not in keys and message["role"] == "assistant":
        message = {keys[0] if key == found else key: value for key, value in message.items()}
    return {key: value for key, value in message.items() if key != TRAIN}


@dataclass(frozen=True, slots=True)
class Form:
    """How messages are handed to a template.

    arguments: those of a call as an object, or as its JSON. beside_calls: what an absent content beside a call is;
    `absent`: nothing. parts: contents as lists of {"type": "text"} parts, as templates of vision models want them.
    wrapped: tools and calls that a row has without a {"type": "function", "function": ...} around them get it.
    """

    arguments: Literal["object", "json"] = "object"
    beside_calls: Literal["absent", "null", "empty"] = "absent"
    parts: bool = False
    wrapped: bool = False

    def of(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages in this form."""
        return messages if self == PLAIN_FORM else [self._message(message) for message in messages]

    def of_tools(self, tools: Tools) -> Tools:
        """The tool schemas of a row in this form."""
        return [_wrapped(tool) for tool in tools] if tools and self.wrapped else tools

    def _message(self, message: Message) -> Message:
        changed: dict[str, Any] = {}
        if "tool_calls" in message:
            calls = message["tool_calls"]
            if self.wrapped:
                calls = [_wrapped(call) for call in calls]
            if self.arguments == "json":
                calls = [_with_json(call) for call in calls]
            changed["tool_calls"] = calls
            if self.beside_calls != "absent" and not message.get("content"):
                changed["content"] = None if self.beside_calls == "null" else ""
        if self.parts and isinstance(message.get("content"), str):
            changed["content"] = [{"type": "text", "text": message["content"]}]
        return {**message, **changed}


PLAIN_FORM = Form()

OTHER_FORMS = (Form(parts=True),)

FORMS_OF_CALLS = (
    Form("object", "null"),
    Form("object", "empty"),
    Form("json", "null"),
    Form("json", "empty"),
)


def forms_of(messages: Sequence[Message], tools: Tools = None) -> tuple[Form, ...]:
    """The forms in which a template may take the messages and tools, to be tried in order."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    forms = (PLAIN_FORM, *(FORMS_OF_CALLS if calls else ()), *OTHER_FORMS)
    if not any(map(_is_bare, (*calls, *(tools or ())))):
        return forms
    # wrapped first: that is what inference servers hand to templates, and many templates write a tool as it comes
    return (*(replace(form, wrapped=True) for form in forms), *forms)


def _is_bare(item: Mapping[str, Any]) -> bool:
    """Whether a tool or a call is a function itself, where most stand around one."""
    return "function" not in item and "name" in item


def _wrapped(item: Mapping[str, Any]) -> Mapping[str, Any]:
    if not _is_bare(item):
        return item
    around = {key: item[key] for key in ("id", "type") if key in item}
    function = {key: value for key, value in item.items() if key not in around}
    return {"type": "function", **around, "function": function}


def _with_json(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def without_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages, with calls whose arguments are empty."""

    def bare(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not function.get("arguments"):
            return call
        function = {**function, "arguments": {}}
        return {**call, "function": function} if "function" in call else function

    return [{**m, "tool_calls": list(map(bare, m["tool_calls"]))} if "tool_calls" in m else m for m in messages]


def writes_python(messages: Sequence[Message], text: str) -> bool:
    """Whether a rendering holds a call or its arguments as Python writes them, or the parts of a content as Python or
    JSON does: no model is to learn that.

    Args:
        messages: in the form that the template was given.
    """
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            if any(isinstance(part, Mapping) and part and str(part) in text for part in (function, arguments)):
                return True
        parts = message.get("content")
        if isinstance(parts, list) and any(str(part) in text or json.dumps(part) in text for part in parts):
            return True
    return False
