"""What may be wrong with rows that are each fine. Floor 2.

In: the groups of each split. Out: Findings: counts, and sentences where they say something. Rows are compared by
hashes of their prompts' words and of their tokens, so nothing is read twice and memory stays small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from strop.data.table import Groups

MUCH_LONGER = 1.25
"""Chosen completions this much longer than rejected ones teach length, too (or the other way round)."""

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


def examine(splits: Mapping[str, Groups]) -> dict[str, Findings]:
    """Findings of every split; `eval` is compared with `train`."""
    rows = {name: _rows(groups) for name, groups in splits.items()}
    train = rows["train"]
    return {name: _of(splits[name], rows[name], None if name == "train" else train) for name in splits}


def _rows(groups: Groups) -> np.ndarray:
    """[rows, 3] hashes: prompt, first and second completion."""
    return np.stack([groups.column(name) for name in ("prompt_hash", "first_hash", "second_hash")], axis=1)


def _of(groups: Groups, rows: np.ndarray, train: np.ndarray | None) -> Findings:
    whole = _joined(rows)
    pairs = groups.lengths.counts == 2
    turned = _joined(rows[pairs][:, [0, 2, 1]])
    labelled = rows[groups.column("label") >= 0]
    relabelled = _joined(np.stack([*labelled[:, :2].T, np.uint64(3) - labelled[:, 2]], axis=1))
    first, second = groups.lengths.taken(np.flatnonzero(pairs)).completions.reshape(-1, 2).T
    length = {}
    if len(first):
        length = {
            "mean_chosen": float(first.mean()),
            "mean_rejected": float(second.mean()),
            "chosen_is_longer": float((first > second).mean()),
        }
    return Findings(
        duplicates=len(whole) - len(np.unique(whole)),
        contradictions=int(np.isin(turned, whole).sum() + np.isin(relabelled, whole).sum()),
        missing_eos=int(groups.column("without_end_token").sum()),
        double_bos=int(groups.column("double_bos").sum()),
        leaked_prompts=0 if train is None else int(np.isin(rows[:, 0], train[:, 0]).sum()),
        leaked_rows=0 if train is None else int(np.isin(whole, _joined(train)).sum()),
        length=length,
        desirable=num_labels(groups)[True],
        undesirable=num_labels(groups)[False],
    )


def num_labels(groups: Groups) -> dict[bool, int]:
    """How many completions are desirable (True) and how many are not."""
    labels = groups.column("label")
    return {label: int((labels == label).sum()) for label in (True, False)}


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


def _joined(rows: np.ndarray) -> np.ndarray:
    """One value a row of three hashes, to be compared."""
    return np.ascontiguousarray(rows).view([("prompt", "u8"), ("first", "u8"), ("second", "u8")]).reshape(-1)
