"""Prompts and completions of a row in strop's own shape. Floor 2.

In: a row whose columns are there. Out: the prompt, and each completion as what follows it: a completion may repeat its
prompt, and two sides without a prompt begin with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.shapes.messages import as_context, in_words, text_of, turns_of, wrong_type
from strop.types import Message, Turns


def same_kind(data: Mapping[str, Any], sides: tuple[str, str]) -> None:
    """Refuses a pair of a text and messages."""
    for side in sides:
        if not isinstance(data[side], str | list | tuple):
            raise wrong_type(side, data[side], "a text or a list of messages")
    if isinstance(data[sides[0]], str) != isinstance(data[sides[1]], str):
        kinds = " and ".join(f"{side} is {in_words(data[side])}" for side in sides)
        raise RowRefused("mixed_types", kinds, expected="both a text, or both a list of messages")


def explicit(data: Mapping[str, Any], prompt_field: str, sides: tuple[str, ...]) -> tuple[Turns, tuple[Turns, ...]]:
    """A prompt in a column of its own. Completions that repeat it have it cut off."""
    value = data[prompt_field]
    if isinstance(value, str) and all(isinstance(data[side], str) for side in sides):
        return text_of(value, prompt_field), tuple(text_of(data[side], side) for side in sides)
    completions = [_answer(data[side], side) for side in sides]
    prompt: tuple[Message, ...]
    if isinstance(value, str):
        prompt = ({"role": "user", "content": text_of(value, prompt_field)},)
        if len(sides) == 2 and all(turns[0]["role"] != "assistant" for turns in completions):
            return _repeated(prompt, completions, sides, prompt_field)
    elif isinstance(value, list | tuple):
        prompt = turns_of(value, prompt_field)
    else:
        raise wrong_type(prompt_field, value, "a text or a list of messages")
    _check_prompt(prompt, prompt_field)
    return prompt, tuple(_after(prompt, turns, side) for turns, side in zip(completions, sides, strict=True))


def _answer(value: Any, field: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": text_of(value, field)},)
    if not isinstance(value, list | tuple):
        raise wrong_type(field, value, "a text or a list of messages")
    return turns_of(value, field)


def _repeated(
    prompt: tuple[Message, ...], completions: list[tuple[Message, ...]], sides: tuple[str, ...], field: str
) -> tuple[Turns, tuple[Turns, ...]]:
    """A prompt as text, and both sides as whole conversations: the prompt must be the last thing the user says."""
    shared, rests = _split(completions[0], completions[1], sides)
    if shared[-1]["content"].strip() != prompt[0]["content"].strip():
        raise RowRefused(
            "prompt_mismatch",
            f"the conversations do not lead up to {field!r}",
            expected=f"the text of {field!r} as the last user turn before the sides differ",
        )
    return shared, rests


def _after(prompt: tuple[Message, ...], turns: tuple[Message, ...], side: str) -> tuple[Message, ...]:
    """What `turns` adds to the prompt."""
    if len(turns) > len(prompt) and as_context(turns[: len(prompt)]) == as_context(prompt):
        turns = turns[len(prompt) :]
    role = turns[0]["role"]
    if role == "assistant":
        return turns
    if len(turns) > 1:
        raise RowRefused(
            "prompt_mismatch",
            f"{side} is a conversation that does not begin with the prompt",
            expected="the assistant's answer to the prompt, or the prompt and the answer",
        )
    raise RowRefused("role_order", f"{side} is a {role} turn", expected="an assistant turn")


def implicit(data: Mapping[str, Any], sides: tuple[str, str], field: str) -> tuple[Turns, tuple[Turns, ...]]:
    """No prompt column: the prompt is what both conversations begin with."""
    if isinstance(data[sides[0]], str):
        raise RowRefused(
            "missing_field",
            f"{field!r} is missing and {sides[0]} and {sides[1]} are texts",
            expected=f"a column {field!r}, or both sides as conversations that begin with the prompt",
            fix="set dataset.prompt_column if the column has another name",
        )
    chosen, rejected = (turns_of(data[side], side) for side in sides)
    return _split(chosen, rejected, sides)


def _split(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], sides: tuple[str, ...]
) -> tuple[tuple[Message, ...], tuple[Turns, ...]]:
    n = 0
    same = [a == b for a, b in zip(as_context(chosen), as_context(rejected), strict=False)]
    while n < len(same) and same[n]:
        n += 1
    if all(same) and len(chosen) == len(rejected):
        raise equal(sides)
    rests = chosen[n:], rejected[n:]
    if n == 0 and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise RowRefused(
            "missing_field",
            f"there is no prompt, and {sides[0]} and {sides[1]} hold the answers alone",
            expected="a prompt column, or both sides as conversations that begin with the prompt",
        )
    if any(not rest or rest[0]["role"] != "assistant" for rest in rests):
        raise RowRefused(
            "prompt_mismatch",
            f"{sides[0]} and {sides[1]} part at turn {n + 1}, which is not an assistant turn in both",
            expected="the same conversation up to an assistant turn",
        )
    _check_prompt(chosen[:n], f"the prompt shared by {sides[0]} and {sides[1]}")
    return chosen[:n], rests


def _check_prompt(prompt: tuple[Message, ...], field: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise RowRefused(
            "role_order", f"{field} ends with an assistant turn", expected="a turn that asks for an answer"
        )


def equal(sides: tuple[str, ...]) -> RowRefused:
    """The refusal of a pair that has nothing to compare."""
    return RowRefused(
        "chosen_equals_rejected", f"{sides[0]} and {sides[1]} are the same", expected="two answers that differ"
    )
