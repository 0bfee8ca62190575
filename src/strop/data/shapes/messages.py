"""Messages and texts of a row, validated. Floor 2.

In: what stands in a column. Out: messages whose roles are known and whose contents are texts, or the refusal that says
what is wrong and where. A turn that the row says is not to be trained has `"train": False`; no other has that key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.shapes.json_columns import object_in, parsed
from strop.data.text.markers import REASONING, REASONING_KEYS
from strop.data.text.message_forms import thought_and_words
from strop.types import Message, Turns

ROLES = ("system", "developer", "user", "assistant", "tool")
MAY_BE_EMPTY = frozenset({"system", "developer", "tool"})
"""Roles whose content may be an empty text: a tool can have nothing to say."""

PLAIN = frozenset({"role", "content"})

TRAIN_KEYS = ("weight", "train", "training", "trainable", "train_turn", "loss", "loss_weight", "loss_mask")
"""Keys by which rows say whether an assistant turn is trained: 0 or false, 1 or true."""

SKIP_KEYS = ("masked", "ignore_loss", "skip_loss")
"""Keys by which they say whether it is not trained."""

OTHER_REASONING_KEYS = (
    "thought",
    "thoughts",
    "reasoning_text",
    "reasoning_trace",
    "thinking_content",
    "thought_process",
    "chain_of_thought",
    "cot",
    "rationale",
)
"""Further keys for reasoning, which no template reads."""

NOT_TEXT = {
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos", "file", "files"), "text alone"),
    "function_call": "tool_calls, a list of calls; or an object with name and arguments",
    "mask": "train: true or false, since it is not known whether a mask of 1 means that the turn is trained",
    "refusal": "the refusal as the content",
    "train_detail": "train: true or false for the whole turn",
    **dict.fromkeys(("reasoning_details", "thinking_blocks"), "the reasoning as a text under reasoning_content"),
}
"""Keys of a message that hold a part of it which is not trained, and what is expected instead."""


def turns_of(value: list[Any] | tuple[Any, ...], field: str) -> tuple[Message, ...]:
    """Messages, validated.

    Args:
        field: what they are called in messages to people.

    Raises:
        RowRefused: what is wrong with the first bad one.
    """
    if not value:
        raise RowRefused("empty_field", f"{field} is an empty list", expected="at least one message")
    turns = tuple(_message(message, f"{field}[{i}]") for i, message in enumerate(value))
    for i, turn in enumerate(turns):
        if turn["role"] in ("system", "developer") and i > 0:
            raise RowRefused(
                "system_not_first", f"{field}[{i}] is a {turn['role']} turn", expected="it as the first turn, or none"
            )
    return turns


def is_trained(turn: Message) -> bool:
    """Whether the row lets an assistant turn be trained."""
    return turn.get("train", True) is not False


def as_context(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The same turns where nothing is trained: whether they are to be does not matter."""
    if all(map(is_trained, turns)):
        return turns
    return tuple({key: value for key, value in turn.items() if key != "train"} for turn in turns)


def as_turns(prompt: Turns) -> tuple[Message, ...]:
    """A prompt by which rows are compared: as a text and as one turn of the user it is the same."""
    if not isinstance(prompt, str):
        return prompt
    return ({"role": "user", "content": prompt},) if prompt else ()


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise wrong_type(field, message, "a message, an object with role and content")
    if "role" not in message:
        reason = "sharegpt_keys" if "from" in message else "missing_field"
        found = "has from/value in place of role/content" if "from" in message else "has no role"
        raise RowRefused(reason, f"{field} {found}", expected="an object with role and content")
    role = message["role"]
    if not isinstance(role, str):
        raise wrong_type(f"{field}.role", role, "a text")
    if role == "function":  # OpenAI's old name
        message, role = {**message, "role": "tool"}, "tool"
    if role not in ROLES:
        raise RowRefused("unknown_role", f"{field}.role is {role[:40]!r}", expected="one of " + ", ".join(ROLES))
    # a missing key and a null are the same to templates of current models; tables fill missing keys with null
    turn = {key: item for key, item in message.items() if item is not None}
    if not turn.keys() <= PLAIN:
        if role == "assistant":
            _settle_reasoning(turn, field)
            _settle_function_call(turn)
        _check_keys(turn, field)
    if "tool_calls" in turn:
        _settle_calls(turn, field)
    calls = role == "assistant" and "tool_calls" in turn
    if "content" in turn:
        turn["content"] = _content(turn["content"], f"{field}.content", may_be_empty=calls or role in MAY_BE_EMPTY)
    elif not calls:
        if "content" in message:
            raise is_null(f"{field}.content", "a text")
        raise RowRefused("missing_field", f"{field} has no content", expected="an object with role and content")
    if role == "assistant" and "content" in turn and not REASONING.isdisjoint(turn):
        _settle_thoughts(turn, field)
    return turn


def _check_keys(turn: dict[str, Any], field: str) -> None:
    """Settles whether the turn is trained, and refuses parts of it that would be lost."""
    for key in [key for key in NOT_TEXT if key in turn]:
        if not _says_nothing(turn[key]):
            raise RowRefused(
                "unsupported_modality", f"{field} has {key!r}, which is not trained", expected=NOT_TEXT[key]
            )
        del turn[key]
    said: dict[str, bool] = {}
    for key in (*TRAIN_KEYS, *SKIP_KEYS):
        if key in turn:
            value = turn.pop(key)
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise RowRefused(
                    "wrong_type",
                    f"{field}.{key} is {in_words(value)}",
                    expected="0 or false, 1 or true: a turn is trained or not, and has no other weight",
                )
            said[key] = bool(value) is (key in TRAIN_KEYS)
    if turn["role"] != "assistant":
        if asked := next((key for key in said if said[key] and key in TRAIN_KEYS and "weight" not in key), None):
            raise RowRefused(
                "wrong_type",
                f"{field}.{asked} is true, and the turn is one of role {turn['role']}",
                expected="assistant turns to be trained, and no others",
            )
    elif len(set(said.values())) > 1:
        raise RowRefused(
            "wrong_type", f"{field} says by {' and '.join(said)} that it is trained and that it is not",
            expected="one answer",
        )  # fmt: skip
    elif False in said.values():
        turn["train"] = False


def _settle_reasoning(turn: dict[str, Any], field: str) -> None:
    """The reasoning of an answer as one text under one key, where the row has it under several or as parts."""
    there = [key for key in (*REASONING_KEYS, *OTHER_REASONING_KEYS) if key in turn]
    texts = {key: _content(turn[key], f"{field}.{key}", may_be_empty=True) for key in there}
    said = {key: text for key, text in texts.items() if text}
    if len(set(said.values())) > 1:
        raise RowRefused(
            "wrong_shape",
            f"{field} has reasoning under {' and '.join(said)}, and the texts differ",
            expected="the reasoning of a turn under one key",
        )
    if not there:
        return
    first = next(iter(said or texts))
    for key in there:
        del turn[key]
    turn[first if first in REASONING_KEYS else REASONING_KEYS[0]] = texts[first]
    if said:  # the same once more, in the form of one provider or another
        turn.pop("reasoning_details", None)
        turn.pop("thinking_blocks", None)


def _settle_thoughts(turn: dict[str, Any], field: str) -> None:
    """A thought that stands under a key and once more between tags in the content is one thought: templates would write
    it twice."""
    key = next((key for key in REASONING_KEYS if turn.get(key, "").strip()), None)
    parts = thought_and_words(turn["content"]) if key is not None else None
    if key is None or parts is None:
        return
    thought, words = parts
    if thought == turn[key].strip():
        del turn[key]
    elif turn["content"].lstrip().startswith("<think>"):
        if thought:
            raise RowRefused(
                "wrong_shape",
                f"{field} has reasoning under {key} and between <think> tags in its content, and the texts differ",
                expected="the reasoning of a turn in one place",
            )
        if words.strip() or "tool_calls" in turn:
            turn["content"] = words


def _settle_function_call(turn: dict[str, Any]) -> None:
    """OpenAI's old form of a call, as today's."""
    call = turn.get("function_call")
    if isinstance(call, Mapping) and "tool_calls" not in turn and isinstance(call.get("name"), str):
        del turn["function_call"]
        turn["tool_calls"] = [{"type": "function", "function": dict(call)}]


def _settle_calls(turn: dict[str, Any], field: str) -> None:
    """The calls of a turn as a list of objects; they may stand as JSON text, and no calls are none."""
    calls = turn["tool_calls"]
    if isinstance(calls, str) and calls.lstrip().startswith("["):
        calls = parsed(calls, f"{field}.tool_calls")
    if not calls:
        del turn["tool_calls"]
    elif not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise wrong_type(f"{field}.tool_calls", calls, "a list of objects")
    else:
        turn["tool_calls"] = [_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The call with its arguments as an object: templates write them as JSON, which would quote a text once more. A
    call without arguments has none."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or "name" not in function:
        return call
    key = "parameters" if "arguments" not in function and "parameters" in function else "arguments"
    found = function.get(key)
    if isinstance(found, str) and found.strip():
        arguments = object_in(found, f"{field}.{key}")
        if arguments is None:
            return call
    elif found is None or isinstance(found, str):
        arguments = {}
    elif key == "parameters":
        arguments = found
    else:
        return call
    function = {**{name: value for name, value in function.items() if name != key}, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _content(value: Any, field: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, str) and isinstance(value, list | tuple):
        value = "".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))
    return text_of(value, field, may_be_empty=may_be_empty)


def _part(part: Any, field: str) -> str:
    if not isinstance(part, Mapping):
        raise wrong_type(field, part, 'an object {"type": "text", "text": ...}')
    if part.get("type") != "text":
        kind = str(part.get("type"))[:40]
        raise RowRefused("unsupported_modality", f"{field} is of type {kind!r}", expected="parts of type text")
    if not isinstance(part.get("text"), str):
        raise wrong_type(f"{field}.text", part.get("text"), "a text")
    others = [key for key, item in part.items() if key not in ("type", "text") and not _says_nothing(item)]
    if others:
        found = f"{field} has {str(others[0])[:40]!r}, which is not trained"
        raise RowRefused("unsupported_modality", found, expected="parts of type text with a text alone")
    return str(part["text"])


def _says_nothing(value: Any) -> bool:
    """Whether a value is empty, or an object of nulls alone, as tables write what is not there."""
    return value in (None, "", [], {}) or (isinstance(value, Mapping) and all(v is None for v in value.values()))


def text_of(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    """A text that can be encoded and is not blank.

    Raises:
        RowRefused: it is none.
    """
    if not isinstance(value, str):
        raise wrong_type(field, value, "a text")
    if not may_be_empty and not value.strip():
        found = "is empty" if not value else f"is only white space ({value[:20]!r})"
        raise RowRefused("empty_field", f"{field} {found}", expected="a text")
    if "\0" in value:
        raise RowRefused("nul_character", f"{field} holds a NUL at character {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused(
            "lone_surrogate",
            f"{field} holds half a surrogate pair, {value[error.start]!r}, at character {error.start}",
            expected="text that can be written as UTF-8",
        ) from error
    return value


def in_words(value: Any) -> str:
    """What a value is, for a message."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return str(value)[:40]
        case str():
            return f"a text ({value[:40]!r})"
        case bytes():
            return "bytes, which are not read"
        case Mapping():
            return "an object"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            return f"a {type(value).__name__}"


def wrong_type(field: str, value: Any, expected: str) -> RowRefused:
    """The refusal of a value of another type."""
    return RowRefused("wrong_type", f"{field} is {in_words(value)}", expected=expected)


def is_null(field: str, expected: str) -> RowRefused:
    """The refusal of a null."""
    return RowRefused("null_field", f"{field} is null", expected=expected)
