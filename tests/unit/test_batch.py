"""Packed and padded batches are two layouts of the same scored tokens."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from strop.batch import NOTHING, Extras, Scores, pack, pad
from strop.types import Completion, Group, Origin

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    tokens = draw(ids)
    mask = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)).filter(any))
    return Completion(array("i", tokens), bytes(mask))


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    made = st.builds(
        lambda prompt, answers: Group(array("i", prompt), tuple(answers), Origin("rows", 1)),
        ids,
        st.lists(completions(), min_size=1, max_size=3),
    )
    return draw(st.lists(made, min_size=1, max_size=4))


@given(groups())
def test_both_layouts_score_the_same_tokens(some: list[Group]) -> None:
    packed, padded = pack(some), pad(some)
    for extras in (NOTHING, Extras(prompts=True)):
        assert pack(some, extras=extras).targets.tolist() == pad(some, extras=extras).targets.tolist()
    assert packed.completion_index.tolist() == padded.completion_index.tolist()
    assert packed.group_index.tolist() == padded.group_index.tolist()
    flat = [b.position_ids.flatten()[b.scored_positions].tolist() for b in (packed, padded)]
    assert flat[0] == flat[1]


@given(groups())
def test_a_scored_position_holds_the_token_before_its_target(some: list[Group]) -> None:
    for batch in (pack(some, extras=Extras(prompts=True)), pad(some, extras=Extras(prompts=True))):
        before = batch.input_ids.flatten()[batch.scored_positions].tolist()
        expected = []
        for group in some:
            for c in group.completions:
                row = [*group.prompt_ids, *c.ids]
                first = len(group.prompt_ids)
                expected += [row[first + j - 1] for j, trained in enumerate(c.loss_mask) if trained]
        assert before == expected + [token for group in some for token in group.prompt_ids[:-1]]
        assert batch.targets[len(expected) :].tolist() == [token for group in some for token in group.prompt_ids[1:]]


@given(groups())
def test_padding_repeats_a_token_of_its_row(some: list[Group]) -> None:
    """Not one that is only padding: its embedding may be all zeros, where a norm has no slope."""
    batch = pad(some)
    assert batch.attention_mask is not None
    for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and (row[length:] == row[length - 1]).all()


@given(groups())
def test_a_prompt_stands_once_and_last_tokens_are_not_fed(some: list[Group]) -> None:
    packed = pack(some)
    assert packed.num_tokens == sum(g.num_tokens for g in some) == packed.input_ids.numel()
    assert packed.layout is not None
    assert [s.stop for s in packed.layout][-1] == packed.num_tokens
    assert pad(some).num_tokens == sum(len(g.prompt_ids) + len(c.ids) - 1 for g in some for c in g.completions)


@given(groups())
def test_counts_and_sums_follow_the_groups(some: list[Group]) -> None:
    batch = pack(some)
    scores = Scores.of(batch, torch.randn(len(batch.targets)))
    assert scores.count("groups") == len(some)
    assert scores.count("completions") == sum(len(g.completions) for g in some)
    assert scores.count("tokens") == sum(g.num_scored for g in some)
    assert scores.count("chosen_tokens") == sum(g.completions[0].num_scored for g in some)
    assert scores.lengths.tolist() == [c.num_scored for g in some for c in g.completions]
    torch.testing.assert_close(scores.sums(scores.logps).sum(), scores.logps.double().sum())
    assert scores.prompt_logps is None and scores.collisions is None


@given(groups())
def test_extras_lie_beside_the_scores_of_completions(some: list[Group]) -> None:
    batch = pack(some, extras=Extras(prompts=True, collisions=True))
    scored = torch.stack([batch.targets, -batch.targets]).double()
    scores = Scores.of(batch, scored)
    completions = sum(g.num_scored for g in some)
    assert scores.prompt_logps is not None and scores.prompt_index is not None and scores.collisions is not None
    assert scores.logps.tolist() == batch.targets[:completions].tolist() == (-scores.collisions).tolist()
    assert scores.prompt_logps.tolist() == batch.targets[completions:].tolist()
    assert scores.prompt_index.tolist() == [i for i, g in enumerate(some) for _ in g.prompt_ids[1:]]
    chosen = sum(g.completions[0].num_scored for g in some)
    assert scores.count("chosen_row_tokens") == batch.count("chosen_row_tokens") == chosen + len(scores.prompt_index)


@given(groups(), groups())
def test_joined_scores_are_those_of_one_batch(left: list[Group], right: list[Group]) -> None:
    a, b, whole = (pack(some, extras=Extras(prompts=True)) for some in (left, right, [*left, *right]))
    joined = Scores.join([Scores.of(x, x.targets.float()) for x in (a, b)])
    expected = Scores.of(whole, whole.targets.float())
    assert joined.prompt_logps is not None and expected.prompt_logps is not None
    assert joined.prompt_index is not None and whole.prompt_index is not None
    assert joined.logps.tolist() == expected.logps.tolist()
    assert joined.prompt_logps.tolist() == expected.prompt_logps.tolist()
    assert joined.prompt_index.tolist() == whole.prompt_index.tolist()
    assert joined.completion_index.tolist() == whole.completion_index.tolist()
    assert joined.group_index.tolist() == whole.group_index.tolist()
