"""Groups come back from the disk as they went there, and views of them are lists of groups."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.store.table import SCHEMA, Groups, Record, Shard, to_table
from strop.plan.tokens import packed_tokens, padded_tokens
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
    backwards = view.taken(np.arange(len(view))[::-1])
    assert list(backwards) == given_[::-1] and list(backwards.lengths) == [g.lengths for g in given_[::-1]]


def test_views_choose_repeat_and_join(on_disk: Callable[..., Groups]) -> None:
    def group(i: int) -> Group:
        return Group(array("i", [i]), (Completion(array("i", [i, i]), b"\0\1"),), Origin("f", i))

    first, second = on_disk([group(i) for i in range(5)]), on_disk([group(i) for i in range(5, 9)])
    both = Groups.joined([first.taken(np.array([4, 0])), second])
    assert [g.origin.line for g in both] == [4, 0, 5, 6, 7, 8]
    twice = both.taken(np.array([5, 5, 0]))
    assert [g.origin.line for g in twice] == [8, 8, 4] and twice.column("line").tolist() == [8, 8, 4]
    assert len(both.taken(np.array([], int))) == 0
