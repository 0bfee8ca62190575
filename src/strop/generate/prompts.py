"""Prompts: one, or a file of them; as tokens. Floor 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strop.data.read.row import RowRefused
from strop.data.read.sources import file_source
from strop.errors import DataError, foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """given: a text, or the turns of a conversation. where: file and line, for messages."""

    given: str | Messages
    where: str

    def shown(self) -> str:
        """As a line for a person."""
        return self.given if isinstance(self.given, str) else str(self.given[-1].get("content") or "")


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: lines of a text file; or rows with `prompt` (a text, or turns) or `messages`, of which the
    answers at the end are left out.

    Raises:
        DataError: a row has neither, or there is none.
    """
    found = []
    for row in file_source(f"text:{path}" if path.endswith(".txt") else path).read():
        if row.refusal is not None:
            raise row.refusal.at(row.origin)
        if row.data is not None:
            try:
                found.append(Prompt(_prompt(row.data), str(row.origin)))
            except RowRefused as refusal:
                raise DataError(
                    f"{refusal.found} [{refusal.reason}]", where=str(row.origin), expected=refusal.expected
                ) from refusal
    if not found:
        raise DataError("there are no prompts in the file", where=path, expected="one or more", fix="give another file")
    return found


def _prompt(row: Mapping[str, Any]) -> str | Messages:
    for name in ("prompt", "text"):
        if isinstance(value := row.get(name), str):
            return value
    turns = row.get("messages") if row.get("prompt") is None else row["prompt"]  # null says that there is none
    expected = '{"prompt": "..."}, {"prompt": [turns]} or {"messages": [turns]}'
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise RowRefused("no_prompt", "the row has no prompt", expected=expected)
    last = max((i for i, turn in enumerate(turns) if turn["role"] != "assistant"), default=-1)
    if last < 0:
        raise RowRefused("no_prompt", "no turn of the row is a user's", expected=expected)
    return turns[: last + 1]


def as_turns(given: str | Messages) -> Messages:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, raw: bool) -> list[int]:
    """A prompt as tokens, up to where the answer begins: by the chat template, where there is one.

    Args:
        raw: the text itself, without a template.

    Raises:
        DataError: it has turns and there is no template, or the template refuses it, or it has no tokens.
    """
    if raw or not tokenizer.chat_template:
        if not isinstance(prompt.given, str):
            raise DataError(
                "the prompt has turns, and there is no chat template" + " with --raw" * raw,
                where=prompt.where,
                expected="a text",
            )
        ids: Sequence[int] = tokenizer(prompt.given)["input_ids"]
    else:
        ids = encode_turns(tokenizer, as_turns(prompt.given), prompt.where)
    if not ids:
        raise DataError("the prompt is empty", where=prompt.where, expected="at least one token")
    return list(ids)


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Messages, where: str) -> list[int]:
    """A conversation as tokens, up to where the assistant's answer begins.

    Raises:
        DataError: the chat template refuses it.
    """
    with foreign_errors(lambda why: _refused(why, where)):
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def _refused(why: str, where: str) -> DataError:
    return DataError(
        f"the chat template refuses the prompt: {why}",
        where=where,
        expected="turns with role and content, in the order that the template takes",
        fix="mend the prompt; --raw leaves the template out",
    )
