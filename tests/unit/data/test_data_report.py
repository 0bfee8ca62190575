"""The report: lengths, tokens and a fingerprint of the content."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from strop.data.data_report import (
    DataReport,
    Rendering,
    SplitCounts,
    fingerprint,
    group_statistics,
    length_summary,
    tally,
)
from strop.types import Completion, Group, Origin

Make = Callable[..., Any]


def group(prompt: Sequence[int], *completions: Sequence[int], masks: Sequence[bytes] = (), line: int = 1) -> Group:
    masks = masks or [b"\1" * len(c) for c in completions]
    sides = tuple(Completion(array("i", c), m) for c, m in zip(completions, masks, strict=True))
    return Group(array("i", prompt), sides, Origin("f", line))


def test_the_fingerprint_is_of_tokens_masks_and_order_alone(on_disk: Make) -> None:
    base = [group([1], [2, 3]), group([4], [5])]
    assert fingerprint(on_disk(base)) == fingerprint(on_disk([group([1], [2, 3], line=9), group([4], [5])], 1))
    others = [
        base[::-1],
        base[:1],
        [group([1, 2], [3]), group([4], [5])],
        [group([1], [2, 3], masks=[b"\0\1"]), group([4], [5])],
        [group([1], [2], [3]), group([4], [5])],
        [],
    ]
    assert len({fingerprint(on_disk(groups)) for groups in [base, *others]}) == 7


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=300))
def test_percentiles_are_lengths_that_occur(lengths: list[int]) -> None:
    summary = length_summary(tally([np.array(lengths)]))
    assert summary == length_summary(Counter(lengths))
    for percent in (50, 90, 99):
        value = summary[f"p{percent}"]
        assert sum(n <= value for n in lengths) >= percent / 100 * len(lengths)
        assert value in lengths and sum(n < value for n in lengths) < percent / 100 * len(lengths)
    assert summary["max"] == max(lengths)


def test_token_counts(on_disk: Make) -> None:
    statistics = group_statistics(on_disk([group([1, 2, 3], [4, 5], [6]), group([1], [2, 3], masks=[b"\0\1"])]))
    assert (statistics["num_groups"], statistics["num_completions"]) == (2, 3)
    assert statistics["tokens"] == {"plain": 12, "trained": 4, "saved_by_prefix_sharing": 3 / 12}
    assert statistics["lengths"]["total"]["max"] == 5
    assert group_statistics(on_disk([]))["lengths"]["prompt"] == {}


def test_cut_completions_are_told_with_their_share_and_what_to_do(on_disk: Make) -> None:
    def lines(cut: int, without_end: int) -> list[str]:
        counts = SplitCounts("rows.jsonl", 2, kept=2)
        counts.changes |= {"completions_cut": cut, "without_end_token": without_end}
        groups = on_disk([group([1], [2], [3]), group([4], [5], [6])])
        return DataReport.of({"train": counts}, {"train": groups}, Rendering(0, 2, None, None)).lines()

    whole, cut = lines(0, 0), lines(3, 2)
    told = [line for line in cut if line not in whole]
    assert len(told) == 2
    assert "3 completions (75.0%) cut" in told[0]
    assert "training.max_seq_length" in told[0] and "dataset.filter_overlength_samples" in told[0]
    assert "2 completions without an end token" in told[1] and "stop" in told[1]


def test_a_report_is_json_and_says_what_was_lost(on_disk: Make) -> None:
    counts = SplitCounts("rows.jsonl", rows_read=3, kept=1)
    counts.changes["prompts_cut"] = 1
    counts.refused["empty_field"] += 1
    counts.dropped["nothing_trained"] += 1
    groups = on_disk([group([1], [2])])
    report = DataReport.of({"train": counts}, {"train": groups}, Rendering(1, 0, "plain", "abc"))
    saved = json.loads(json.dumps(report.as_dict()))
    assert saved["splits"]["train"]["refused"] == {"empty_field": 1}
    assert saved["splits"]["train"]["fingerprint"] == fingerprint(groups)
    assert saved["rendering"]["template_sha256"] == "abc"
    lines = "\n".join(report.lines())
    for words in ("1 of 3 rows", "1 rows refused: empty_field", "1 rows dropped: nothing_trained", "1 prompts cut"):
        assert words in lines
