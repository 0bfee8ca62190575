"""How the messages of a row are handed to a chat template. Floor 2.

In: messages as rows have them. Out: the forms in which a template may take them, to be tried in order.

Templates differ in the key under which they look for reasoning, and in whether the arguments of a tool call are an
object or its JSON as text, and the content beside a call null, empty or absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from strop.data.marks import REASONING_KEYS
from strop.types import Message

TRAIN = "train"
"""Key of a turn that is false where the row says that the turn is not to be trained; no template sees it."""

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@lru_cache
def reasoning_keys(template: str) -> tuple[str, ...]:
    """The keys under which a template looks for reasoning."""
    source = COMMENT.sub("", template)
    return tuple(key for key in REASONING_KEYS if re.search(rf"""(?:\.|['"]){key}\b(?!['"]?\s*:)""", source))


def has_reasoning(message: Message) -> bool:
    """Whether a turn has reasoning under a key of its own."""
    return message["role"] == "assistant" and any(message.get(key) for key in REASONING_KEYS)


def without_reasoning(message: Message) -> Message:
    """The turn without what stands under a key for reasoning."""
    return {key: value for key, value in message.items() if key not in REASONING_KEYS}


def readable(message: Message, keys: Sequence[str]) -> Message:
    """The turn with its reasoning under the key that the template reads, and without strop's own key."""
    found = next((key for key in REASONING_KEYS if message.get(key)), None)
    if found is not None and keys and found not in keys:
        message = {keys[0] if key == found else key: value for key, value in message.items()}
    return {key: value for key, value in message.items() if key != TRAIN}


def call_forms(messages: Sequence[Message]) -> Iterator[tuple[Message, ...]]:
    """The messages in every form that templates take tool calls in; only themselves where there are no calls."""
    yield tuple(messages)
    if any("tool_calls" in message for message in messages):
        for as_text in (False, True):
            for content in (None, ""):
                yield tuple(_calling(message, as_text, content) for message in messages)


def _calling(message: Message, as_text: bool, content: str | None) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [_call(call) if as_text else call for call in message["tool_calls"]]
    return {**message, "content": message.get("content") or content, "tool_calls": calls}


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def writes_python(messages: Sequence[Message], text: str) -> bool:
    """Whether a rendering holds arguments of a call as Python writes them, which no model is to learn."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            if isinstance(arguments, Mapping) and arguments and str(arguments) in text:
                return True
    return False
