"""Packed and padded batches are two layouts of the same scored tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strop.batch import PROMPT_LOGPS, Batch, GroupSpan, Scores, TokenScores, pack, pad
from strop.columns import Columns, Structure, completions, groups, tokens
from strop.objectives.pairs import chosen_row_tokens, chosen_tokens, rejected_tokens
from strop.types import Completion, Group, Origin

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)
PROMPTS = frozenset({PROMPT_LOGPS})


@st.composite
def answers(draw: st.DrawFn) -> Completion:
    given_ids = draw(ids)
    mask = draw(st.lists(st.booleans(), min_size=len(given_ids), max_size=len(given_ids)).filter(any))
    return Completion(array("i", given_ids), bytes(mask))


@st.composite
def rows(draw: st.DrawFn, sizes: Sequence[int] = (1, 2, 3, 8)) -> list[Group]:
    """Groups of unlike numbers of completions."""
    made = []
    for size in draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=4)):
        found = draw(st.lists(answers(), min_size=size, max_size=size))
        made.append(Group(array(draw(st.sampled_from("iq")), draw(ids)), tuple(found), Origin("rows", 1)))
    return made


def by_token(some: Sequence[Group]) -> tuple[list[int], list[int], list[int], list[GroupSpan]]:
    """A packed row, one token after the other: ids, positions, scored positions, spans."""
    row: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    spans = []
    for group in some:
        start, prompt = len(row), len(group.prompt_ids)
        row += group.prompt_ids
        positions += range(prompt)
        for completion in group.completions:
            before = start + prompt - 1
            for j, (token, trained) in enumerate(zip(completion.ids, completion.loss_mask, strict=True)):
                if trained:
                    scored.append(before)
                before = len(row)
                if j < len(completion.ids) - 1:
                    row.append(token)
                    positions.append(prompt + j)
        spans.append(GroupSpan(start, prompt, tuple(len(c.ids) - 1 for c in group.completions)))
    return row, positions, scored, spans


@given(rows())
def test_a_packed_row_is_built_token_by_token(some: list[Group]) -> None:
    batch = pack(some)
    assert batch.layout is not None and batch.attention_mask is None
    tensors = (batch.input_ids[0], batch.position_ids[0], batch.scored_positions)
    assert all(t.dtype == torch.int64 for t in (*tensors, batch.targets, batch.completion_index, batch.group_index))
    assert (*(t.tolist() for t in tensors), list(batch.layout)) == by_token(some)
    assert batch.row_lengths == (batch.input_ids.numel(),)


@given(rows())
def test_padded_rows_are_built_token_by_token(some: list[Group]) -> None:
    batch, expected = pad(some), [[*g.prompt_ids, *c.ids[:-1]] for g in some for c in g.completions]
    width = max(map(len, expected))
    assert batch.layout is None and batch.attention_mask is not None
    assert batch.input_ids.dtype == torch.int64 and batch.attention_mask.dtype == torch.bool
    # not a token that is only padding: its embedding may be all zeros, where a norm has no slope
    assert batch.input_ids.tolist() == [row + row[-1:] * (width - len(row)) for row in expected]
    assert batch.attention_mask.tolist() == [[j < len(row) for j in range(width)] for row in expected]
    assert batch.position_ids.tolist() == [list(range(width))] * len(expected)
    assert batch.row_lengths == tuple(map(len, expected))


@given(rows())
def test_both_layouts_score_the_same_tokens(some: list[Group]) -> None:
    packed, padded = pack(some), pad(some)
    for wants in (frozenset[str](), PROMPTS):
        assert pack(some, wants=wants).targets.tolist() == pad(some, wants=wants).targets.tolist()
    assert packed.structure == padded.structure
    assert packed.completion_index.tolist() == padded.completion_index.tolist()
    assert packed.group_index.tolist() == padded.group_index.tolist()
    flat = [b.position_ids.flatten()[b.scored_positions].tolist() for b in (packed, padded)]
    assert flat[0] == flat[1]


@given(rows())
def test_a_scored_position_holds_the_token_before_its_target(some: list[Group]) -> None:
    for batch in (pack(some, wants=PROMPTS), pad(some, wants=PROMPTS)):
        before = batch.input_ids.flatten()[batch.scored_positions].tolist()
        expected = []
        for group in some:
            for c in group.completions:
                row = [*group.prompt_ids, *c.ids]
                first = len(group.prompt_ids)
                expected += [row[first + j - 1] for j, trained in enumerate(c.loss_mask) if trained]
        assert before == expected + [token for group in some for token in group.prompt_ids[:-1]]
        assert batch.targets[len(expected) :].tolist() == [token for group in some for token in group.prompt_ids[1:]]


@given(rows())
def test_a_prompt_stands_once_and_last_tokens_are_not_fed(some: list[Group]) -> None:
    packed = pack(some)
    assert packed.num_tokens == sum(g.num_tokens for g in some) == packed.input_ids.numel()
    assert packed.layout is not None
    assert [s.stop for s in packed.layout][-1] == packed.num_tokens
    assert pad(some).num_tokens == sum(len(g.prompt_ids) + len(c.ids) - 1 for g in some for c in g.completions)


@given(rows())
def test_counts_and_sums_follow_the_groups(some: list[Group]) -> None:
    batch = pack(some)
    scores = Scores.of(batch, TokenScores(torch.randn(len(batch.targets))))
    counts = [unit(scores.structure) for unit in (groups, completions, tokens)]
    assert counts == [len(some), sum(len(g.completions) for g in some), sum(g.num_scored for g in some)]
    assert all(type(n) is int for n in counts)
    assert scores.lengths.tolist() == [c.num_scored for g in some for c in g.completions]
    torch.testing.assert_close(scores.sums(scores.logps).sum(), scores.logps.double().sum())
    assert not scores.columns.names


@given(rows(sizes=(2,)))
def test_sides_of_pairs_are_counted_apart(some: list[Group]) -> None:
    structure = pack(some).structure
    chosen, rejected = (sum(g.completions[i].num_scored for g in some) for i in (0, 1))
    assert (chosen_tokens(structure), rejected_tokens(structure)) == (chosen, rejected)
    assert chosen_row_tokens(structure) == chosen + sum(len(g.prompt_ids) - 1 for g in some)


@given(rows())
def test_what_a_policy_scores_beside_is_laid_apart(some: list[Group]) -> None:
    batch = pack(some, wants={PROMPT_LOGPS, "entropy"})
    scores = Scores.of(batch, batch.token_scores(batch.targets, entropy=-batch.targets, unwanted=batch.targets))
    n = sum(g.num_scored for g in some)
    assert scores.logps.tolist() == batch.targets[:n].tolist() == (-scores["entropy"]).tolist()
    assert scores[PROMPT_LOGPS].tolist() == batch.targets[n:].tolist()
    assert scores.columns.names == {PROMPT_LOGPS, "entropy"}
    scores.columns.check(scores.structure)


def columns_of(batch: Batch) -> Columns:
    """A column on each level that a source can supply, different everywhere."""
    s = batch.structure
    return Columns(
        {"per_token": torch.arange(s.num_tokens) + s.prompt_lengths[0]},
        {"per_completion": torch.arange(s.num_completions) * 1.5},
        {"per_group": torch.arange(s.num_groups) == 0, "vectors": torch.arange(2 * s.num_groups).view(-1, 2)},
    )


@given(rows(), rows())
def test_joined_scores_are_those_of_one_batch(left: list[Group], right: list[Group]) -> None:
    parts = [columns_of(pack(some)) for some in (left, right)]
    a, b = (pack(some, columns, PROMPTS) for some, columns in zip((left, right), parts, strict=True))
    whole = pack([*left, *right], Columns.join(parts), PROMPTS)
    joined = Scores.join([Scores.of(x, x.token_scores(x.targets.float())) for x in (a, b)])
    expected = Scores.of(whole, whole.token_scores(whole.targets.float()))
    assert joined.structure == expected.structure
    assert joined.columns.names == expected.columns.names == {*parts[0].names, PROMPT_LOGPS}
    for name in joined.columns.names:
        assert torch.equal(joined[name], expected[name])
    assert joined.logps.tolist() == expected.logps.tolist()
    assert joined.completion_index.tolist() == whole.completion_index.tolist()
    assert joined.group_index.tolist() == whole.group_index.tolist()


def test_columns_that_do_not_fit_are_refused() -> None:
    group = Group(array("i", [1, 2]), (Completion(array("i", [3, 4]), b"\1\1"),) * 3, Origin("rows", 1))
    for level, wrong in {"per_token": 5, "per_completion": 2, "per_group": 3}.items():
        with pytest.raises(ValueError, match=f"column advantages has {wrong} values, expected .*{level}"):
            pack([group], Columns(**{level: {"advantages": torch.zeros(wrong)}}))
    once = Columns(per_group={"labels": torch.zeros(1)})
    with pytest.raises(ValueError, match="supplied twice: labels"):
        once.beside(Columns(per_completion={"labels": torch.zeros(3)}))
    with pytest.raises(ValueError, match="that others lack: labels"):
        Columns.join([once, Columns()])
    with pytest.raises(KeyError, match="no column 'rewards'; there are: labels"):
        once.find("rewards")


def test_labels_of_groups_are_a_column() -> None:
    answer = (Completion(array("i", [3]), b"\1"),)
    some = [Group(array("i", [1]), answer, Origin("rows", i), label) for i, label in enumerate((True, False, True))]
    for batch in (pack(some), pad(some)):
        assert batch.columns.per_group["labels"].tolist() == [True, False, True]


def test_a_batch_moves_with_its_columns() -> None:
    group = Group(array("i", [1, 2]), (Completion(array("i", [3, 4]), b"\1\1"),), Origin("rows", 1), True)
    moved = pack([group], Columns(per_token={"ref_logps": torch.zeros(2)})).to(torch.device("meta"))
    found = [moved.input_ids, moved.group_index, moved.columns.find("ref_logps"), moved.columns.find("labels")]
    assert {t.device.type for t in found} == {"meta"}
    assert moved.structure == Structure((1,), (2,), (2,))


def test_a_batch_goes_to_a_gpu_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, columns too; to a CPU nothing is copied. The GPU is played: tensors stay where they are."""
    pinned: set[int] = set()
    moved: list[tuple[str, bool, bool]] = []

    def pin(self: Tensor) -> Tensor:
        copy = self.clone()
        pinned.add(id(copy))
        kept.append(copy)  # so that no other tensor gets its id
        return copy

    def to(self: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        moved.append((device.type, id(self) in pinned, non_blocking))
        return self

    kept: list[Tensor] = []
    one = Group(array("i", [1, 2]), (Completion(array("i", [3, 4]), b"\1\1"),), Origin("rows", 1), label=True)
    batch = pack([one, one], Columns(per_group={"rewards": torch.ones(2)}))
    num_tensors = sum(isinstance(v, Tensor) for v in vars(batch).values()) + len(batch.columns.names)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    there = batch.to(torch.device("cuda"))
    assert moved == [("cuda", True, True)] * num_tensors and num_tensors > 5
    assert all(torch.equal(v, getattr(there, n)) for n, v in vars(batch).items() if isinstance(v, Tensor))
    moved.clear()
    batch.to(torch.device("cpu"))
    assert moved == [("cpu", False, False)] * num_tensors
