"""Problems of the data as a whole, such as duplicates, although each row is fine. Floor 2.

In: the groups of each split. Out: Findings: counts, and sentences about those that matter. Rows are compared by hashes
of their prompts and of their tokens, so no row is read again and memory stays small: 8 bytes per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from strop.data.store.table import Groups
from strop.lengths import starts_of, taken_ragged

MUCH_LONGER = 1.25
"""If chosen completions are this many times as long as rejected ones, or the reverse, length is learnt as well."""

MOST_DESIRABLE = 4 / 3
"""Desirable completions may count so many times as much as undesirable ones."""


@dataclass(frozen=True)
class Findings:
    """Of one split. Rows where no other unit is named.

    duplicates: rows that are there before. contradictions: pairs that
    stand there the other way round, too, and completions that have both labels.
    missing_eos: completions without an end token. double_bos: prompts with two BOS tokens. leaked_prompts: rows whose
    prompt is trained on as well (eval), leaked_rows: rows that are, completions and all. length: of pairs, mean tokens
    of both sides and the share of pairs whose chosen side is the longer one; empty for other rows. desirable,
    undesirable: completions with this label.
    """

    duplicates: int
    contradictions: int
    missing_eos: int
    double_bos: int
    leaked_prompts: int
    leaked_rows: int
    length: Mapping[str, float]
    desirable: int
    undesirable: int

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "length": dict(self.length)}

    def sentences(self) -> Iterator[str]:
        """What a person should look at; nothing where all is well."""
        notes = {
            "rows stand there more than once, with the same tokens": self.duplicates,
            "rows are contradicted by another (a pair the other way round, or the other label)": self.contradictions,
            "prompts begin with two BOS tokens": self.double_bos,
            "rows have a prompt that is trained on as well": self.leaked_prompts,
            "rows are trained on as well, completions and all": self.leaked_rows,
        }
        yield from (f"{n} {what}" for what, n in notes.items() if n)
        if self.desirable or self.undesirable:
            yield f"{self.desirable} desirable and {self.undesirable} undesirable completions"
        if not self.length:
            return
        chosen, rejected = self.length["mean_chosen"], self.length["mean_rejected"]
        share = 100 * self.length["chosen_is_longer"]
        words = f"chosen completions have {chosen:.0f} tokens and rejected ones {rejected:.0f} (mean), chosen is longer"
        biased = max(chosen, rejected) > MUCH_LONGER * min(chosen, rejected)
        note = "; training may drift to that length, so watch it" if biased else ""
        yield f"{words} in {share:.0f} % of the pairs{note}"


def examine(splits: Mapping[str, Groups], *, pairs: bool) -> dict[str, Findings]:
    """Findings of every split; `eval` is compared with `train`. pairs: the groups are pairs."""
    others = {name: groups for name, groups in splits.items() if name != "train"}
    found, leaked_rows = {}, {}
    for name, groups in splits.items():
        keys = _sorted(_keys, groups)
        found[name] = _of(groups, keys, pairs)
        if name == "train":
            leaked_rows = {other: _num_of(others[other], _keys, keys) for other in others}
        del keys  # the next take as much memory
    if others:
        prompts = _sorted(_prompts, splits["train"])
        for name, groups in others.items():
            leaked_prompts = _num_of(groups, _prompts, prompts)
            found[name] = replace(found[name], leaked_prompts=leaked_prompts, leaked_rows=leaked_rows[name])
    return found


def _of(groups: Groups, keys: np.ndarray, pairs: bool) -> Findings:
    """What is found in a split alone. keys: of its groups, sorted."""
    labels = num_labels(groups)
    return Findings(
        duplicates=int((keys[1:] == keys[:-1]).sum()),
        contradictions=_num_of(groups, lambda some: _contrary_keys(some, pairs), keys),
        missing_eos=groups.sum("without_end_token"),
        double_bos=groups.sum("double_bos"),
        leaked_prompts=0,
        leaked_rows=0,
        length=_pair_lengths(groups) if pairs else {},
        desirable=labels[True],
        undesirable=labels[False],
    )


def _pair_lengths(groups: Groups) -> dict[str, float]:
    """Mean tokens of both sides of pairs, and how often the chosen one is longer; nothing where there are none."""
    num_pairs, sums = 0, np.zeros(3, np.int64)
    for lengths in groups.lengths.chunks():
        first = lengths.starts[:-1][lengths.counts == 2]
        chosen, rejected = lengths.completions[first], lengths.completions[first + 1]
        num_pairs += len(first)
        sums += [chosen.sum(dtype=np.int64), rejected.sum(dtype=np.int64), (chosen > rejected).sum()]
    names = ("mean_chosen", "mean_rejected", "chosen_is_longer")
    return dict(zip(names, (sums / num_pairs).tolist(), strict=True)) if num_pairs else {}


Hashes = Callable[[Groups], np.ndarray]
"""[rows] uint64 of groups."""


def _sorted(hashes: Hashes, groups: Groups) -> np.ndarray:
    """[rows] hashes of all groups, sorted."""
    found = np.empty(len(groups), np.uint64)
    done = 0
    for some in groups.chunks():
        found[done : done + len(some)] = hashes(some)
        done += len(some)
    found.sort()
    return found


def _num_of(groups: Groups, hashes: Hashes, known: np.ndarray) -> int:
    """How many of the groups have a hash that is among the sorted ones."""
    return sum(_num_in(hashes(some), known) for some in groups.chunks())


def _prompts(groups: Groups) -> np.ndarray:
    return groups.column("prompt_hash")


def _keys(groups: Groups) -> np.ndarray:
    """[rows] uint64, equal for groups with one prompt, the same completions in the same order and the same label."""
    hashes, starts = groups.ragged("hashes")
    return _mixed(groups.column("prompt_hash"), hashes, starts, groups.column("label"))


def _contrary_keys(groups: Groups, are_pairs: bool) -> np.ndarray:
    """The keys of groups that would contradict these: pairs the other way round, completions with the other label."""
    hashes, starts = groups.ragged("hashes")
    prompts, labels = groups.column("prompt_hash"), groups.column("label")
    pairs, labelled = np.flatnonzero(are_pairs & (np.diff(starts) == 2)), np.flatnonzero(labels >= 0)
    turned = np.stack([hashes[starts[pairs] + 1], hashes[starts[pairs]]], axis=1).reshape(-1)
    relabelled = taken_ragged(hashes, starts, labelled)
    return np.concatenate(
        [
            _mixed(prompts[pairs], turned, 2 * np.arange(len(pairs) + 1), labels[pairs]),
            _mixed(prompts[labelled], relabelled, starts_of(np.diff(starts)[labelled]), 1 - labels[labelled]),
        ]
    )


def _mixed(prompts: np.ndarray, hashes: np.ndarray, starts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[rows] uint64 of a prompt's hash, its completions' hashes one after the other, and a label (-1: none)."""
    counts = np.diff(starts)
    keys = _stirred(prompts ^ (labels + 1).astype(np.uint64))
    for place in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(counts > place)
        keys[rows] = _stirred(keys[rows] ^ hashes[starts[rows] + place])
    return keys


def _stirred(keys: np.ndarray) -> np.ndarray:
    """Numbers whose bits all depend on all bits: the finisher of splitmix64 (Steele et al. 2014)."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(keys ^ (keys >> np.uint64(31)))


def _num_in(keys: np.ndarray, known: np.ndarray) -> int:
    """How many of the keys are among the sorted ones."""
    if not len(known):
        return 0
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return int((known[places] == keys).sum())


def num_labels(groups: Groups) -> dict[bool, int]:
    """How many completions are desirable (True) and how many are not."""
    found = {True: 0, False: 0}
    for some in groups.chunks():
        labels = some.column("label")
        for label in found:
            found[label] += int((labels == label).sum())
    return found


def imbalance(labels: Mapping[bool, int], desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to say of labels whose weight times number is not between 1 : 1 and 4 : 3, as arXiv 2402.01306 advises."""
    num, other = labels[True], labels[False]
    if not num or not other:
        kind = "desirable" if num else "undesirable"
        return (
            f"all {num + other} completions are {kind}: nothing says what sets others apart, so the model only learns "
            f"to make these {'likelier' if num else 'less likely'}; add rows of the other label"
            + (", or imitate these by post_training.method: sft" if num else "")
        )
    ratio = desirable_weight * num / (undesirable_weight * other)
    if 1 <= ratio <= MOST_DESIRABLE:
        return None
    middle = (1 + MOST_DESIRABLE) / 2
    return (
        f"{num} desirable and {other} undesirable completions, with weights {desirable_weight:g} and "
        f"{undesirable_weight:g}, count {ratio:.2f} : 1; between 1 : 1 and 4 : 3 is advised: set "
        f"post_training.desirable_weight: {desirable_weight * middle / ratio:.3g}, or undesirable_weight: "
        f"{undesirable_weight * ratio / middle:.3g}"
    )
