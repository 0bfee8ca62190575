"""The reference's log-probs beside groups: scored, or read from the store, before the first step. Floor 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strop.data.plan import cut
from strop.engine.progress import Progress
from strop.engine.source import Cut, GroupSet
from strop.policy.policy import Policy
from strop.policy.reference import not_known, only, reference_logps, stored_logps
from strop.policy.store import ReferenceStore, by_completion, completion_keys
from strop.types import Group


def scored(
    reference: Policy,
    store: ReferenceStore | None,
    rows: GroupSet,
    cut_by: Cut,
    progress: Progress,
    indices: list[int] | None = None,
    visits: list[int] | None = None,
) -> GroupSet:
    """The set with the reference's log-probs of these groups and of these visits' mismatched ones (default: all).

    A completion at the same prompt is scored once, wherever it stands.
    """
    numbers = range(len(rows.groups)) if indices is None else indices
    keys = {i: completion_keys(rows.groups[i]) for i in numbers}  # groups stay on disk until they are scored
    known = stored_logps(reference, store, rows.groups, keys) if store else {}
    missing = not_known(keys, known.keys())
    if missing:
        sizes = {i: only(rows.groups[i], new).lengths for i, new in missing.items()}
        parts = cut(sizes, missing, cut_by.budget_tokens, cut_by.tokens)
        task = progress.task("reference log-probs", sum(size.num_tokens for size in sizes.values()))

        def keep(groups: Sequence[Group], logps: Sequence[Tensor]) -> None:
            known.update(by_completion(groups, logps))
            if store is not None:
                store.append(groups, logps)
            task.step(n=sum(group.num_tokens for group in groups))

        reference_logps(reference, ([only(rows.groups[i], missing[i]) for i in part] for part in parts), keep)
        if store is not None:  # what stands there first, of another run perhaps, is what a resume reads
            known |= store.read(known.keys())
    others = rows.mismatched and scored(reference, store, rows.mismatched, cut_by, progress, visits)

    def ref_logps(part: Sequence[int]) -> list[Tensor]:
        return [torch.cat([known[key] for key in keys[i]]) for i in part]

    return replace(rows, ref_logps=ref_logps, mismatched=others)
