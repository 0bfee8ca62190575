"""Groups come back from the disk as they went there, and views of them are lists of groups."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.store.table import SCHEMA, Groups, Record, Shard, to_table
from strop.lengths import completion_key, keys_of, prompt_key
from strop.plan.row_tokens import packed_tokens, padded_tokens
from strop.types import Completion, Group, Origin

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(lambda xs: array("i", xs))


@st.composite
def groups(draw: st.DrawFn, sides: int) -> Group:
    completions = []
    for _ in range(sides):
        tokens = draw(ids)
        mask = bytearray(
            draw(st.binary(min_size=len(tokens), max_size=len(tokens)).map(lambda b: bytes(x & 1 for x in b)))
        )
        mask[-1] = 1
        completions.append(Completion(tokens, bytes(mask)))
    origin = Origin(draw(st.sampled_from("ab")), draw(st.integers(1, 2**40)))
    return Group(draw(ids), tuple(completions), origin, draw(st.sampled_from([None, True, False])))


@pytest.mark.nightly
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 8).flatmap(groups), min_size=1, max_size=9), st.integers(1, 4))
def test_groups_come_back(tmp_path_factory: Any, given_: list[Group], rows_a_batch: int) -> None:
    path: Path = tmp_path_factory.mktemp("table") / "t.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for at in range(0, len(given_), rows_a_batch):
            some = given_[at : at + rows_a_batch]
            writer.write_batch(to_table([Record(g, "ab".index(g.origin.file), b"") for g in some]))
    view = Groups.of(Shard(path, ["a", "b"]))
    assert list(view) == given_ and view == given_ and list(view[1:]) == given_[1:]
    assert list(view.lengths) == [g.lengths for g in given_]
    assert packed_tokens(view.lengths) == packed_tokens(given_)
    assert padded_tokens(view.lengths) == padded_tokens(given_)
    scored, starts = view.ragged("scored")
    assert [scored[a:b].tolist() for a, b in pairwise(starts)] == [
        [c.num_scored for c in g.completions] for g in given_
    ]
    numbers = np.arange(len(view))[::-2]
    for known in (view.keyed(numbers), keys_of(given_, numbers)):
        assert list(known.lengths) == [given_[i].lengths for i in numbers]
        assert known.scored.tolist() == [c.num_scored for i in numbers for c in given_[i].completions]
        assert known.prompts.tolist() == [prompt_key(given_[i].prompt_ids) for i in numbers]
        assert known.completions.tolist() == [completion_key(c) for i in numbers for c in given_[i].completions]
    backwards = view.taken(np.arange(len(view))[::-1])
    assert list(backwards) == given_[::-1] and list(backwards.lengths) == [g.lengths for g in given_[::-1]]


def test_keys_are_of_tokens_and_of_what_is_trained() -> None:
    def pair(prompt: list[int], completion: list[int], mask: bytes) -> tuple[int, int]:
        return prompt_key(array("i", prompt)), completion_key(Completion(array("i", completion), mask))

    one = pair([1, 2, 3], [4, 5], b"\1\1")
    others = [
        pair([1, 2, 3], [4, 5], b"\0\1"),
        pair([1, 2, 3], [4, 6], b"\1\1"),
        pair([1, 2], [4, 5], b"\1\1"),
        pair([1, 2], [3, 4, 5], b"\0\1\1"),  # the same tokens in all, parted elsewhere
    ]
    assert len({one, *others}) == 5 and one == pair([1, 2, 3], [4, 5], b"\1\1")


def test_of_a_pair_twenty_bytes_stay_in_memory(on_disk: Callable[..., Groups]) -> None:
    """Its place and its lengths; what stands for one file of many takes none."""
    sides = tuple(Completion(array("i", [i, i]), b"\0\1") for i in (1, 2))
    groups = on_disk([Group(array("i", [3] * 5), sides, Origin("f", i + 1)) for i in range(1000)])
    for view in (groups, groups.taken(np.arange(0, 1000, 2))):
        lengths = view.lengths
        arrays = (view._row_of, view.shard_of, lengths.prompt, lengths.completions, lengths.starts)
        assert sum(a.nbytes for a in arrays if a.strides != (0,)) <= 20 * len(view) + 8
        assert view.shard_of.tolist() == [0] * len(view)


def test_views_choose_repeat_and_join(on_disk: Callable[..., Groups]) -> None:
    def group(i: int) -> Group:
        return Group(array("i", [i]), (Completion(array("i", [i, i]), b"\0\1"),), Origin("f", i))

    first, second = on_disk([group(i) for i in range(5)]), on_disk([group(i) for i in range(5, 9)])
    both = Groups.joined([first.taken(np.array([4, 0])), second])
    assert [g.origin.line for g in both] == [4, 0, 5, 6, 7, 8]
    twice = both.taken(np.array([5, 5, 0]))
    assert [g.origin.line for g in twice] == [8, 8, 4] and twice.column("line").tolist() == [8, 8, 4]
    assert len(both.taken(np.array([], int))) == 0
