"""What became of the rows: counts by reason, lengths, and a fingerprint of the tokens. Floor 2.

In: what happened to each row, and the groups. Out: a DataReport, which is the run's data.json. In every split
rows_read = kept + refused + dropped; blank lines stand beside it.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from strop.types import Group

PERCENTILES = (50, 90, 99)


@dataclass
class SplitCounts:
    """Counts of one split. Rows where no other unit is named.

    refused: by reason, rows that could not be read or rendered. dropped: by reason, rows with nothing to train on
    within the limits. prompts_cut: rows. completions_cut, without_end_token, boundaries_split: completions.
    controls_as_text: control tokens that stood in contents and were encoded as text.
    """

    source: str
    rows_read: int = 0
    blank_lines: int = 0
    kept: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_cut: int = 0
    completions_cut: int = 0
    without_end_token: int = 0
    boundaries_split: int = 0
    controls_as_text: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "refused": dict(self.refused), "dropped": dict(self.dropped)}


@dataclass(frozen=True)
class Rendering:
    """How rows became text.

    template: `tokenizer`, the name of a shipped one, the path of a file, or null where every row was trained as the
    text that it is.
    """

    num_chat: int
    num_raw: int
    template: str | None
    template_sha256: str | None


@dataclass(frozen=True)
class DataReport:
    """Everything there is to know about the data of a run before its first step."""

    splits: Mapping[str, SplitCounts]
    statistics: Mapping[str, Mapping[str, Any]]
    fingerprint: str
    rendering: Rendering

    @classmethod
    def of(cls, counts: Mapping[str, SplitCounts], groups: Mapping[str, Sequence[Group]], how: Rendering) -> DataReport:
        statistics = {name: group_statistics(groups[name]) for name in counts}
        together = hashlib.sha256("".join(str(s["fingerprint"]) for s in statistics.values()).encode())
        return cls(counts, statistics, together.hexdigest(), how)

    def as_dict(self) -> dict[str, Any]:
        """What json.dump takes."""
        return {
            "fingerprint": self.fingerprint,
            "rendering": vars(self.rendering),
            "splits": {name: {**c.as_dict(), **self.statistics[name]} for name, c in self.splits.items()},
        }

    def lines(self) -> list[str]:
        """What a person should know, in words: one line a split, and one for each thing that was lost or changed."""
        how = self.rendering
        lines = [f"text: {how.num_chat} rows by the {how.template} chat template"] if how.num_chat else []
        lines += [f"text: {how.num_raw} rows as they are, by no template"] if how.num_raw else []
        for name, c in self.splits.items():
            tokens = self.statistics[name]["tokens"]
            lines.append(f"{name}: {c.kept} of {c.rows_read} rows from {c.source}, {tokens['trained']} trained tokens")
            lines += [f"{name}: {n} rows refused: {reason}" for reason, n in c.refused.most_common()]
            lines += [f"{name}: {n} rows dropped: {reason}" for reason, n in c.dropped.most_common()]
            notes = {
                "blank lines": c.blank_lines,
                "prompts cut at the left": c.prompts_cut,
                "completions cut at the right": c.completions_cut,
                "completions without an end token after the cut": c.without_end_token,
                "boundaries inside a token, encoded in two parts": c.boundaries_split,
                "control tokens in the rows' words, encoded as text": c.controls_as_text,
            }
            lines += [f"{name}: {n} {what}" for what, n in notes.items() if n]
        return lines


def group_statistics(groups: Sequence[Group]) -> dict[str, Any]:
    """Lengths in tokens, token counts and the fingerprint of groups in their order.

    `saved_by_prefix_sharing` is the share of the tokens of plain rows that rows with one prompt a group do without.
    """
    completions = [completion for group in groups for completion in group.completions]
    plain = sum(len(g.prompt_ids) + len(c.ids) for g in groups for c in g.completions)
    shared = sum(len(g.prompt_ids) * (len(g.completions) - 1) for g in groups)
    return {
        "num_groups": len(groups),
        "lengths": {
            "prompt": length_summary([len(g.prompt_ids) for g in groups]),
            "completion": length_summary([len(c.ids) for c in completions]),
            "total": length_summary([len(g.prompt_ids) + len(c.ids) for g in groups for c in g.completions]),
        },
        "tokens": {
            "plain": plain,
            "trained": sum(c.num_scored for c in completions),
            "saved_by_prefix_sharing": shared / plain if plain else 0.0,
        },
        "fingerprint": fingerprint(groups),
    }


def length_summary(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, nearest-rank percentiles and maximum; empty for no lengths."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    ranks = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}


def fingerprint(groups: Sequence[Group]) -> str:
    """SHA-256 over token ids and masks in order: the same data gives the same, wherever and whenever it was read."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(_bytes(array("i", [len(group.prompt_ids), *(len(c.ids) for c in group.completions)])))
        digest.update(_bytes(group.prompt_ids))
        for completion in group.completions:
            digest.update(_bytes(completion.ids) + completion.loss_mask)
    return digest.hexdigest()


def _bytes(ids: array[int]) -> bytes:
    if sys.byteorder == "big":
        ids = array("i", ids)
        ids.byteswap()
    return ids.tobytes()
