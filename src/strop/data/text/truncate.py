"""Truncates rows that are too long, or drops them. Floor 2.

In: an encoded example and the limits. Out: the Group that is trained on, or the reason why there is none; both are
counted. The prompt is truncated on the left to its limit (whole messages before single tokens), then completions on the
right to theirs, then completions to what remains of the sequence. All completions of a group have the same limit.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from strop.config import TrainingSection
from strop.data.read.row import RowRefused
from strop.data.text.encode import Encoded, EncodedSide
from strop.types import Completion, Example, Group, Message, Origin

Encode = Callable[[Sequence[Example]], Sequence[Encoded | RowRefused]]
"""Renders and encodes examples."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Lengths in tokens. drop: leave longer rows out instead of cutting them."""

    sequence: int
    prompt: int | None = None
    completion: int | None = None
    drop: bool = False

    @classmethod
    def of(cls, training: TrainingSection, drop: bool) -> Limits:
        return cls(training.max_seq_length, training.max_prompt_length, training.max_completion_length, drop)

    def of_whole_rows(self) -> Limits:
        """For rows without a border between prompt and completion: texts and tokens."""
        return Limits(self.sequence, drop=self.drop)

    def prompt_is_too_long(self, encoded: Encoded) -> bool:
        return self.prompt is not None and len(encoded.prompt_ids) > self.prompt


@dataclass(frozen=True, slots=True)
class Truncated:
    """An example within the limits.

    group: None where nothing is left to train on; `dropped` then says why. completions_cut: completions that lost
    trained tokens.
    """

    group: Group | None
    dropped: str | None
    prompt_cut: bool
    completions_cut: int


def shorter_prompts(example: Example) -> list[Example]:
    """The example with ever fewer messages in front, longest first: the system turn and the last user turn stay.

    A cut prompt begins with a user turn, as templates want it.
    """
    if isinstance(example.prompt, str):
        return []
    prompt: tuple[Message, ...] = example.prompt
    kept = 1 if prompt and prompt[0]["role"] in ("system", "developer") else 0
    starts = [i for i in range(kept + 1, len(prompt)) if prompt[i]["role"] == "user"]
    return [replace(example, prompt=prompt[:kept] + prompt[i:]) for i in starts]


def shorten_prompts(examples: Sequence[Example], limits: Limits, encode: Encode) -> list[Encoded | None]:
    """Each example, whose prompt is too long, without as few messages as make it fit, or with the fewest there can be.

    None where there is no message to leave out. The number is found by bisection, all examples at once.
    """
    choices = [shorter_prompts(example) for example in examples]
    found: list[Encoded | None] = [None] * len(examples)
    low, high = [0] * len(examples), [len(choice) for choice in choices]
    # invariant: fewer than `low` left-out turns do not fit; `high` do, or are one more than there can be
    while open_ := [n for n in range(len(examples)) if low[n] < high[n]]:
        middle = [(low[n] + high[n]) // 2 for n in open_]
        for n, m, encoded in zip(
            open_, middle, encode([choices[n][m] for n, m in zip(open_, middle, strict=True)]), strict=True
        ):
            fits = isinstance(encoded, Encoded) and not limits.prompt_is_too_long(encoded)
            if isinstance(encoded, Encoded) and (fits or m == len(choices[n]) - 1):
                found[n] = encoded
            low[n], high[n] = (low[n], m) if fits else (m + 1, high[n])
    return found


def truncate(
    encoded: Encoded,
    limits: Limits,
    origin: Origin,
    *,
    bos: int | None,
    prompt_cut: bool = False,
    label: bool | None = None,
    differ: bool = True,
) -> Truncated:
    """The example within the limits, or the reason to drop it.

    Args:
        bos: a prompt that begins with this token keeps it when it is cut.
        prompt_cut: messages have been left out already.
        label: that of the example.
        differ: two completions must not be the same: they are the sides of a pair.
    """
    if limits.drop and (reason := _too_long(encoded, limits)):
        return Truncated(None, reason, False, 0)
    prompt = encoded.prompt_ids
    if limits.prompt is not None and limits.prompt_is_too_long(encoded):
        prompt, prompt_cut = _cut_left(prompt, limits.prompt, bos), True
    room = limits.sequence - len(prompt)
    if limits.completion is not None:
        room = min(room, limits.completion)
    sides = [_cut_right(side, max(room, 0)) for side in encoded.sides]
    completions_cut = sum(
        side.mask.count(1) < whole.mask.count(1) for side, whole in zip(sides, encoded.sides, strict=True)
    )
    if not all(1 in side.mask for side in sides):
        return Truncated(None, "nothing_trained", prompt_cut, completions_cut)
    if differ and len(sides) == 2 and sides[0] == sides[1]:
        reason = "equal_after_truncation" if completions_cut else "equal_tokens"
        return Truncated(None, reason, prompt_cut, completions_cut)
    completions = tuple(Completion(array("i", side.ids), side.mask) for side in sides)
    return Truncated(Group(array("i", prompt), completions, origin, label), None, prompt_cut, completions_cut)


def _too_long(encoded: Encoded, limits: Limits) -> str | None:
    """The first limit that the example is beyond, as the reason to drop it."""
    longest = max(len(side.ids) for side in encoded.sides)
    if limits.prompt_is_too_long(encoded):
        return "prompt_too_long"
    if limits.completion is not None and longest > limits.completion:
        return "completion_too_long"
    if len(encoded.prompt_ids) + longest > limits.sequence:
        return "sequence_too_long"
    return None


def _cut_left(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` tokens of a longer prompt; a BOS token in front takes the place of the first of them."""
    head = prompt[:1] if prompt[0] == bos and room > 1 else []
    return head + prompt[len(prompt) - room + len(head) :]


def _cut_right(side: EncodedSide, room: int) -> EncodedSide:
    """At most `room` tokens, and none after the last trained one."""
    stop = side.mask.rfind(1, 0, room) + 1
    if stop == len(side.ids):
        return side
    return EncodedSide(side.ids[:stop], side.mask[:stop])
