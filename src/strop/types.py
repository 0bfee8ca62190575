"""The two forms that data takes on its way: an Example is text, a Group is tokens. Floor 0: stdlib only.

row --data/shapes--> Example --data/text--> Group --plan--> Batch (batch.py)
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Message = Mapping[str, Any]
"""One turn of a conversation: `role`, `content`, and what else the chat template of the model reads."""

Turns = tuple[Message, ...] | str
"""A conversation (or its continuation) as messages, or raw text."""

RowShape = Literal["single", "pair", "labelled", "group", "prompt"]
"""The completions of a row that a method needs:

    single     one
    pair       two, chosen and rejected
    labelled   one with a label
    group      any number
    prompt     none: they are sampled. One that stands in the row is given to the rewards.
"""

OF_COMPLETIONS: Mapping[str, str] = {
    "rewards": "a list with a number per completion",
    "ended": "a list that says of each completion whether it came to its end (true) or was cut off",
    "normalised_rewards": "a list with a number per completion: the weighted sum of its rewards, each normalised over "
    "the group, as rollouts.jsonl of a run with advantage gdpo has it",
}
"""Columns of a row that hold a number per completion: name -> how it is written."""

OF_GROUPS: Mapping[str, str] = {
    "margin": "a number, by how much the chosen completion is better; 0 where that is not known",
    "sampling_temperature": "a number above 0, what logits were divided by when the completions were sampled",
}
"""Columns of a row that hold one number: name -> how it is written."""

OF_TOKENS: Mapping[str, str] = dict.fromkeys(
    ("old_logps", "sampler_logps"), "a list per completion with the log-prob of each of its tokens when it was sampled"
)
"""Columns of a row that hold a log-prob per trained token: name -> how it is written. `old_logps`: under the policy
that a ratio is taken to. `sampler_logps`: as what sampled the tokens has them."""

NUMBERS: Mapping[str, str] = {**OF_COMPLETIONS, **OF_TOKENS, **OF_GROUPS}
"""All columns of numbers that a row can have. The settings of a method name those that it takes from rows."""

LARGEST = 1e60
"""The largest size of a reward, a margin or a log-prob. The squares of much larger ones, which standard deviations are
made of, do not fit into a float64: every advantage of the group would be 0."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from: the file (or data set) and its physical line, from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text: a prompt and its completions, all messages or all raw text.

    `completions` holds one for single rows; (chosen, rejected) for pairs; at least one for groups. Assistant turns in
    `prompt` are context; every assistant turn in a completion is trained. A multi-turn SFT conversation is split before
    its first assistant turn: the rest is the completion, with several trained spans. `label`: whether the completion of
    a labelled row is a desirable one; None for other rows, and for a pair that labelled rows are to be made of. An
    assistant turn with `"train": False` is one that the row says is not to be trained. `notes`: what was done to the
    row so that it could be read, for the report. `template_kwargs`: the row's own variables for the chat template.
    `numbers`: those of `OF_COMPLETIONS`, `OF_TOKENS` and `OF_GROUPS` that the row has, by name: per completion a
    number, or one per trained token; or one number alone.
    """

    prompt: Turns
    completions: tuple[Turns, ...]
    origin: Origin
    tools: tuple[Mapping[str, Any], ...] | None = None
    label: bool | None = None
    notes: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] | None = None
    numbers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def split_before(self, turn: int) -> Example:
        """The same conversation with its first `turn` messages as the prompt, where it has one completion."""
        if isinstance(self.prompt, str) or len(self.completions) > 1 or isinstance(self.completions[0], str):
            return self
        turns = self.prompt + self.completions[0]
        return replace(self, prompt=turns[:turn], completions=(turns[turn:],))


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that follow the prompt, and which of them are trained.

    ids: n token ids. loss_mask: n bytes, 1 = trained; at least one is.
    """

    ids: array[int]
    loss_mask: bytes

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.loss_mask) > 0
        assert 1 in self.loss_mask

    @property
    def num_scored(self) -> int:
        return self.loss_mask.count(1)


def judged(group: Group) -> Group:
    """The group as a reward model reads it. Adds one dummy token to each completion and makes it the only scored one,
    so the reward is read at the completion's last real token."""
    completions = tuple(
        Completion(array(c.ids.typecode, [*c.ids, c.ids[-1]]), bytes(len(c.ids)) + b"\1") for c in group.completions
    )
    return replace(group, completions=completions)


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """The lengths of a group in tokens: all that planning needs."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def lengths(self) -> GroupLengths:
        """Itself, so that plans take groups and lengths alike."""
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens of the shared-prefix row: the prompt once, then every completion without its last token."""
        return self.prompt + sum(self.completions) - len(self.completions)


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its n completions, as tokens: what everything after the data room works on.

    prompt_ids: at least one token (the first completion token needs a position that predicts it). label: as in
    Example. numbers: what lies beside the tokens, by name: of `OF_COMPLETIONS` one per completion, of `OF_TOKENS` one
    per trained token, completion after completion, of `OF_GROUPS` one.
    """

    prompt_ids: array[int]
    completions: tuple[Completion, ...]
    origin: Origin
    label: bool | None = None
    numbers: Mapping[str, array[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) > 0 and self.completions

    @property
    def lengths(self) -> GroupLengths:
        return GroupLengths(len(self.prompt_ids), tuple(len(c.ids) for c in self.completions))

    @property
    def num_tokens(self) -> int:
        """Tokens of the shared-prefix row: the prompt once, then every completion without its last token."""
        return self.lengths.num_tokens

    @property
    def num_scored(self) -> int:
        return sum(c.num_scored for c in self.completions)
