"""Truncation: within the limits, both sides alike, the end of the prompt and the beginning of the answers kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from strop.data.text.encode import Encoded, EncodedSide
from strop.data.text.truncate import Limits, shorten_prompts, shorter_prompts, truncate
from strop.types import Example, Message, Origin

HERE = Origin("rows.jsonl", 1)
BOS = 0


@st.composite
def encoded(draw: st.DrawFn, num_sides: int | None = None) -> Encoded:
    """Prompts of distinct ids, maybe after a BOS; sides whose last token is trained, as the encoder makes them."""
    length = draw(st.integers(1, 12))
    prompt = draw(st.sampled_from([[BOS], []])) + list(range(100, 100 + length))
    sides = []
    for side in range(num_sides or draw(st.integers(1, 2))):
        mask = bytes(draw(st.lists(st.integers(0, 1), max_size=10))) + b"\1"
        sides.append(EncodedSide([1000 * (side + 1) + i for i in range(len(mask))], mask))
    return Encoded(prompt, tuple(sides), 0, 0)


limits = st.builds(
    Limits,
    sequence=st.integers(2, 25),
    prompt=st.none() | st.integers(1, 12),
    completion=st.none() | st.integers(1, 12),
    drop=st.booleans(),
).filter(lambda found: found.prompt is None or found.prompt < found.sequence)


@given(encoded(), limits)
def test_what_comes_out_is_within_the_limits_and_part_of_what_went_in(row: Encoded, limit: Limits) -> None:
    done = truncate(row, limit, HERE, bos=BOS)
    assert (done.group is None) == (done.dropped is not None)
    if done.group is None:
        return
    prompt, completions = list(done.group.prompt_ids), done.group.completions
    assert len(prompt) <= (limit.prompt or limit.sequence)
    for whole, part in zip(row.sides, completions, strict=True):
        assert len(prompt) + len(part.ids) <= limit.sequence
        assert len(part.ids) <= (limit.completion or limit.sequence)
        # the beginning of the answer, to its last trained token
        assert list(part.ids) == whole.ids[: len(part.ids)] and part.loss_mask == whole.mask[: len(part.ids)]
        assert part.loss_mask[-1] == 1
    head = row.prompt_ids[:1] if row.prompt_ids[0] == BOS and len(prompt) > 1 else []
    assert prompt == head + row.prompt_ids[len(row.prompt_ids) - len(prompt) + len(head) :]
    assert done.prompt_cut == (prompt != row.prompt_ids)
    lost = [w.mask.count(1) > p.num_scored for w, p in zip(row.sides, completions, strict=True)]
    assert done.completions_cut == sum(lost)
    if limit.drop:
        assert not done.prompt_cut and not done.completions_cut


@given(encoded(), limits)
def test_nothing_is_cut_or_dropped_without_need(row: Encoded, limit: Limits) -> None:
    longest = max(len(side.ids) for side in row.sides)
    fits = (
        len(row.prompt_ids) <= (limit.prompt or limit.sequence)
        and longest <= (limit.completion or limit.sequence)
        and len(row.prompt_ids) + longest <= limit.sequence
    )
    done = truncate(row, limit, HERE, bos=BOS)
    if fits:
        assert done.group is not None and not done.prompt_cut and not done.completions_cut
    elif limit.drop:
        assert done.dropped in ("prompt_too_long", "completion_too_long", "sequence_too_long")
    elif done.dropped is not None:
        assert done.dropped == "nothing_trained"
    else:
        assert done.prompt_cut or done.completions_cut or longest > max(len(c.ids) for c in done.group.completions)


@given(encoded(num_sides=2), limits)
def test_both_sides_of_a_pair_are_cut_by_the_same_bound(row: Encoded, limit: Limits) -> None:
    done = truncate(row, limit, HERE, bos=BOS)
    if done.group is None:
        return
    swapped = truncate(Encoded(row.prompt_ids, row.sides[::-1], 0, 0), limit, HERE, bos=BOS)
    assert swapped.group is not None
    assert swapped.group.completions == done.group.completions[::-1]
    for n, one in enumerate(row.sides):
        # a side is cut as it would be without the other
        alone = truncate(Encoded(row.prompt_ids, (one,), 0, 0), limit, HERE, bos=BOS)
        assert alone.group is not None and alone.group.completions == (done.group.completions[n],)


def test_a_cut_prompt_keeps_its_bos_token_and_its_end() -> None:
    row = Encoded([BOS, 1, 2, 3, 4], (EncodedSide([9], b"\1"),), 0, 0)
    for limit, expected in ((3, [BOS, 3, 4]), (2, [BOS, 4]), (1, [4])):
        done = truncate(row, Limits(10, prompt=limit), HERE, bos=BOS)
        assert done.group is not None and list(done.group.prompt_ids) == expected and done.prompt_cut
    other = truncate(row, Limits(10, prompt=3), HERE, bos=None)
    assert other.group is not None and list(other.group.prompt_ids) == [2, 3, 4]


def side(ids: Sequence[int], mask: bytes | None = None) -> EncodedSide:
    return EncodedSide(list(ids), mask or b"\1" * len(ids))


def test_sides_that_become_equal_are_dropped_with_their_own_reason() -> None:
    pair = Encoded([5], (side([1, 2, 3]), side([1, 2, 4])), 0, 0)
    assert truncate(pair, Limits(10), HERE, bos=None).dropped is None
    assert truncate(pair, Limits(10, completion=2), HERE, bos=None).dropped == "equal_after_truncation"
    equal = Encoded([5], (side([1, 2]), side([1, 2])), 0, 0)
    assert truncate(equal, Limits(10), HERE, bos=None).dropped == "equal_tokens"


def test_a_prompt_that_fills_the_sequence_leaves_nothing_to_train() -> None:
    row = Encoded(list(range(10)), (side([1, 2]),), 0, 0)
    assert truncate(row, Limits(10), HERE, bos=None).dropped == "nothing_trained"
    context = Encoded([1], (side([1, 2, 3], b"\0\0\1"),), 0, 0)
    assert truncate(context, Limits(10, completion=2), HERE, bos=None).dropped == "nothing_trained"


def message(role: str, length: int = 1) -> Message:
    return {"role": role, "content": "x" * length}


def test_shorter_prompts_keep_the_system_turn_and_the_last_user_turn() -> None:
    roles = ("system", "user", "assistant", "tool", "assistant", "user", "assistant", "user")
    prompt = tuple(message(role) for role in roles)
    shorter = [e.prompt for e in shorter_prompts(Example(prompt, ((message("assistant"),),), HERE))]
    assert shorter == [(prompt[0], *prompt[5:]), (prompt[0], prompt[7])]
    assert [e.prompt for e in shorter_prompts(Example(prompt[1:], ((message("assistant"),),), HERE))] == [
        prompt[5:],
        prompt[7:],
    ]
    for prompt_ in ((), (message("user"),), (message("system"), message("user")), "text"):
        assert shorter_prompts(Example(prompt_, ("x",), HERE)) == []


@given(st.lists(st.lists(st.integers(1, 9), max_size=9), min_size=1, max_size=6), st.integers(1, 30))
def test_as_few_messages_as_possible_are_left_out(rows: list[list[int]], limit: int) -> None:
    examples = [
        Example(tuple(message("user", n) for n in lengths) or "text", ((message("assistant"),),), HERE)
        for lengths in rows
    ]

    def encode(batch: Sequence[Example]) -> list[Any]:
        return [Encoded([1] * sum(len(m["content"]) for m in e.prompt), (side([1]),), 0, 0) for e in batch]  # type: ignore[index]

    found = shorten_prompts(examples, Limits(100, prompt=limit), encode)
    for lengths, result in zip(rows, found, strict=True):
        if len(lengths) < 2:
            assert result is None
            continue
        shorter = [sum(lengths[i:]) for i in range(1, len(lengths))]
        expected = next((n for n in shorter if n <= limit), shorter[-1])
        assert result is not None and len(result.prompt_ids) == expected
