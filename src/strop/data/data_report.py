"""The report on the data: what became of every row, lengths, and a fingerprint of the tokens. Floor 2.

In: what happened to each row, and the groups. Out: a DataReport, which is written as data.json. In every split,
rows_read = kept + not_used + refused + dropped; blank lines are counted separately.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from strop.allocator import give_back_freed_memory
from strop.data.counters import COUNTERS
from strop.data.problems import Findings, examine
from strop.data.store.table import Groups
from strop.lengths import CHUNK

PERCENTILES = (50, 90, 99)


@dataclass
class SplitCounts:
    """Counts of one split. Rows where no other unit is named.

    refused: by reason, rows that could not be read or rendered. dropped: by reason, rows with nothing to train on
    within the limits. not_used: good rows that a source's `fraction` or `dataset.max_eval_samples` leaves
    out. changes: by the names of `COUNTERS`,
    what was done to the rows that are kept.
    """

    source: str
    rows_read: int = 0
    blank_lines: int = 0
    kept: int = 0
    not_used: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    changes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def as_dict(self) -> dict[str, Any]:
        """What data.json holds: the changes stand beside the other counts."""
        others = {name: value for name, value in vars(self).items() if name != "changes"}
        return {**others, **self.changes, "refused": dict(self.refused), "dropped": dict(self.dropped)}


@dataclass(frozen=True)
class Rendering:
    """How rows became text.

    template: `tokenizer`, the name of a shipped one, the path of a file, or null where every row was trained as the
    text that it is. date: what the template takes for today, where it prints the day.
    """

    num_chat: int
    num_raw: int
    template: str | None
    template_sha256: str | None
    date: str | None = None


@dataclass(frozen=True)
class DataReport:
    """Everything that is known about the data of a run before its first step."""

    splits: Mapping[str, SplitCounts]
    statistics: Mapping[str, Mapping[str, Any]]
    findings: Mapping[str, Findings]
    fingerprint: str
    rendering: Rendering

    @classmethod
    def of(
        cls,
        counts: Mapping[str, SplitCounts],
        groups: Mapping[str, Groups],
        how: Rendering,
        *,
        trained: Groups | None = None,
        pairs: bool = True,
        sampled: bool = False,
    ) -> DataReport:
        """From what became of the rows of every split; there is a split `train`. trained: its groups as often as their
        sources' weights have them trained, default once each. pairs: groups of two are a chosen and a rejected side.
        sampled: completions will be sampled, so no token of the rows is trained."""
        statistics = {name: group_statistics(groups[name]) for name in counts}
        if sampled:
            statistics = {
                name: {**found, "tokens": {**found["tokens"], "trained": 0}} for name, found in statistics.items()
            }
        parts = [str(s["fingerprint"]) for s in statistics.values()]
        if trained is not None and trained is not groups["train"]:
            parts.append(fingerprint(trained))
        give_back_freed_memory(len(groups["train"]))
        together = hashlib.sha256("".join(parts).encode())
        return cls(counts, statistics, examine(groups, pairs=pairs), together.hexdigest(), how)

    def as_dict(self) -> dict[str, Any]:
        """What json.dump takes."""
        return {
            "fingerprint": self.fingerprint,
            "rendering": vars(self.rendering),
            "splits": {
                name: {**c.as_dict(), **self.statistics[name], "findings": self.findings[name].as_dict()}
                for name, c in self.splits.items()
            },
        }

    def lines(self) -> list[str]:
        """Lines of text: one per split, and one for everything that was lost or changed."""
        how = self.rendering
        lines = [f"text: {how.num_chat:,} rows by the {how.template} chat template"] if how.num_chat else []
        lines += [f"text: {how.num_raw:,} rows as they are, by no template"] if how.num_raw else []
        lines += [f"text: the template prints the day, {how.date} (dataset.date)"] if how.date else []
        for name, c in self.splits.items():
            tokens = self.statistics[name]["tokens"]
            kept = f"{c.kept:,} of {c.rows_read:,} rows from {c.source}"
            trained = f"{tokens['trained']:,} trained tokens" if tokens["trained"] else "no token of them is trained"
            lines.append(f"{name}: {kept}, {trained}")
            lines += [f"{name}: {words}" for words in self._lengths(name)]
            lines += [f"{name}: {n:,} rows refused: {reason}" for reason, n in c.refused.most_common()]
            lines += [f"{name}: {n:,} rows dropped: {reason}" for reason, n in c.dropped.most_common()]
            notes = {
                "blank lines": c.blank_lines,
                "rows not used, by the fraction of their source or max_eval_samples": c.not_used,
                **{words: c.changes[name] for name, words in COUNTERS.items() if words},
            }
            lines += [f"{name}: {n:,} {what}" for what, n in notes.items() if n]
            lines += [f"{name}: {words}" for words in self._cut(name)]
            lines += [f"{name}: {sentence}" for sentence in self.findings[name].sentences()]
        return lines

    def _cut(self, name: str) -> Iterator[str]:
        """How many completions are truncated, and what to do about it."""
        changes = self.splits[name].changes
        if num_cut := changes["completions_cut"]:
            share = num_cut / self.statistics[name]["num_completions"]
            yield (
                f"{num_cut:,} completions ({share:.1%}) cut at the right: raise training.max_seq_length "
                "(and max_completion_length), or leave such rows out by dataset.filter_overlength_samples: true"
            )
        if num_open := changes["without_end_token"]:
            yield (
                f"{num_open:,} completions without an end token after the cut: the model does not learn from them "
                "where to stop"
            )

    def _lengths(self, name: str) -> Iterator[str]:
        """How long rows are, and what sharing prompts saves."""
        lengths, tokens = self.statistics[name]["lengths"], self.statistics[name]["tokens"]
        if not lengths["total"]:
            return
        parts = [
            f"{part} " + " / ".join(f"{summary[p]:,}" for p in ("p50", "p90", "p99", "max"))
            for part, summary in lengths.items()
        ]
        yield f"tokens (median / 90 % / 99 % / most): {', '.join(parts)}"
        if tokens["saved_by_prefix_sharing"]:
            yield f"shared prompts save {100 * tokens['saved_by_prefix_sharing']:.0f} % of {tokens['plain']:,} tokens"


def group_statistics(groups: Groups) -> dict[str, Any]:
    """Lengths in tokens, token counts and the fingerprint of groups in their order.

    `saved_by_prefix_sharing` is the share of the tokens of plain rows that rows with one prompt per group do without.
    """
    lengths = groups.lengths
    prompts, completions = tally([lengths.prompt]), tally([lengths.completions])
    rows = tally(some.completions + np.repeat(some.prompt, some.counts) for some in lengths.chunks())
    plain = _sum(rows)
    shared = plain - _sum(completions) - _sum(prompts)
    return {
        "num_groups": len(groups),
        "num_completions": len(lengths.completions),
        "lengths": {
            "prompt": length_summary(prompts),
            "completion": length_summary(completions),
            "total": length_summary(rows),
        },
        "tokens": {
            "plain": plain,
            "trained": sum(int(some.ragged("scored")[0].sum(dtype=np.int64)) for some in groups.chunks()),
            "saved_by_prefix_sharing": shared / plain if plain else 0.0,
        },
        "fingerprint": fingerprint(groups),
    }


def tally(lengths: Iterable[np.ndarray]) -> Counter[int]:
    """How many there are of each length."""
    found = Counter[int]()
    for each in lengths:
        for start in range(0, len(each), CHUNK):
            values, counts = np.unique(each[start : start + CHUNK], return_counts=True)
            found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return found


def _sum(lengths: Counter[int]) -> int:
    return sum(length * count for length, count in lengths.items())


def length_summary(lengths: Counter[int]) -> dict[str, float]:
    """Mean, nearest-rank percentiles and maximum; empty for no lengths."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    up_to = list(accumulate(lengths[length] for length in ordered))
    num = up_to[-1]
    ranks = {f"p{p}": ordered[bisect_left(up_to, max(1, -(-num * p // 100)))] for p in PERCENTILES}
    return {"mean": _sum(lengths) / num, **ranks, "max": ordered[-1]}


def fingerprint(groups: Groups) -> str:
    """SHA-256 over hashes of token ids and masks in order: the same data gives the same, wherever and whenever it was
    read."""
    digest = hashlib.sha256()
    for some in groups.chunks():
        digest.update(some.column("digest").tobytes())
    return digest.hexdigest()
