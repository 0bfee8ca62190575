"""Groups with what is laid beside them, cut into micro-batches. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strop.batch import NOTHING, Batch, Extras
from strop.data.plan import RowTokens, cut
from strop.engine.progress import Progress
from strop.policy.policy import Policy
from strop.policy.reference import not_known, only, reference_logps, stored_logps
from strop.policy.store import ReferenceStore, by_completion, completion_keys
from strop.types import Group


@dataclass(frozen=True)
class Rows:
    """Groups, how they are cut into micro-batches, and what is laid beside them.

    ref_logps: indices of groups -> the reference's log-probs of each, [scored tokens], where the objective needs them.
    mismatched: the prompts with completions of others, by visit, where the objective needs them. extras: what else the
    policy is to score.
    """

    groups: Sequence[Group]
    budget_tokens: int
    tokens: RowTokens
    ref_logps: Callable[[Sequence[int]], list[Tensor]] | None = None
    mismatched: Rows | None = None
    extras: Extras = NOTHING

    def parts(self, indices: Iterable[int] | None = None) -> list[list[int]]:
        """Indices of groups (default: all), cut into micro-batches."""
        return cut(
            self.groups, range(len(self.groups)) if indices is None else indices, self.budget_tokens, self.tokens
        )

    def apart(self, policy: Policy, visits: Iterable[int] | None = None) -> Iterator[Batch]:
        """The micro-batches of the mismatched completions of these visits (default: all), where there are any."""
        rows = self.mismatched
        return iter(()) if rows is None else (rows.batch(policy, part) for part in rows.parts(visits))

    def smaller(self, indices: Iterable[int] | None = None, visits: Iterable[int] | None = None) -> Rows | None:
        """Cut finer, so that the largest micro-batches of these groups, and of these visits' mismatched completions
        (default: all), come in two; None: each is one group already."""
        found = [self._divisible(self.parts(indices))]
        if self.mismatched is not None:
            found.append(self.mismatched._divisible(self.mismatched.parts(visits)))
        largest = max(found)
        return self.cut_to(largest // 2) if largest else None

    def _divisible(self, parts: Iterable[Sequence[int]]) -> int:
        """Tokens of the largest micro-batch of several groups, or 0."""
        return max((self.tokens([self.groups[i] for i in part]) for part in parts if len(part) > 1), default=0)

    def cut_to(self, budget_tokens: int) -> Rows:
        """The same under another budget, the mismatched completions' too."""
        others = self.mismatched and self.mismatched.cut_to(budget_tokens)
        return replace(self, budget_tokens=budget_tokens, mismatched=others)

    def batch(self, policy: Policy, part: Sequence[int]) -> Batch:
        refs = None if self.ref_logps is None else self.ref_logps(part)
        return policy.collate([self.groups[i] for i in part], refs, self.extras)


def scored(
    reference: Policy,
    store: ReferenceStore | None,
    rows: Rows,
    progress: Progress,
    indices: list[int] | None = None,
    visits: list[int] | None = None,
) -> Rows:
    """The rows with the reference's log-probs of these groups and of these visits' mismatched ones (default: all).

    A completion at the same prompt is scored once, wherever it stands.
    """
    numbers = range(len(rows.groups)) if indices is None else indices
    keys = {i: completion_keys(rows.groups[i]) for i in numbers}  # groups stay on disk until they are scored
    known = stored_logps(reference, store, rows.groups, keys) if store else {}
    missing = not_known(keys, known.keys())
    if missing:
        sizes = {i: only(rows.groups[i], new).lengths for i, new in missing.items()}
        parts = cut(sizes, missing, rows.budget_tokens, rows.tokens)
        task = progress.task("reference log-probs", sum(size.num_tokens for size in sizes.values()))

        def keep(groups: Sequence[Group], logps: Sequence[Tensor]) -> None:
            known.update(by_completion(groups, logps))
            if store is not None:
                store.append(groups, logps)
            task.step(n=sum(group.num_tokens for group in groups))

        reference_logps(reference, ([only(rows.groups[i], missing[i]) for i in part] for part in parts), keep)
        if store is not None:  # what stands there first, of another run perhaps, is what a resume reads
            known |= store.read(known.keys())
    others = rows.mismatched and scored(reference, store, rows.mismatched, progress, visits)

    def ref_logps(part: Sequence[int]) -> list[Tensor]:
        return [torch.cat([known[key] for key in keys[i]]) for i in part]

    return replace(rows, ref_logps=ref_logps, mismatched=others)
