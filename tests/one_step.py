"""The groups and micro-batches of one small optimizer step in float64, for tests that take it in several ways."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scored import ref_columns
from strop.batch import Batch, pack
from strop.config.methods import MethodSettings
from strop.data.mismatch import Mismatched
from strop.objectives.base import Objective
from strop.plan.cutting import cut
from strop.plan.row_tokens import packed_tokens
from strop.policy.policy import Policy
from strop.types import Completion, Group, Origin


class Float64Torch:
    """Stands for torch in the modelling file, whose norms and rotary tables would round to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def make_groups(rows: str) -> list[Group]:
    generator = torch.Generator().manual_seed(5)

    def draw(n: int) -> array[int]:
        return array("i", torch.randint(4, 400, (n,), generator=generator).tolist())

    groups = []
    for i in range(8):
        lengths = (3 + 5 * (i % 3), 2 + i)
        masks = [b"\0" * (i % 2) + b"\1" * (n - i % 2) for n in lengths]
        answers = tuple(Completion(draw(n), m) for n, m in zip(lengths, masks, strict=True))
        label = i % 3 == 0 if rows == "labelled" else None
        groups.append(Group(draw(4 + 3 * i), answers if rows == "pair" else answers[:1], Origin("rows", i + 1), label))
    return groups


def batches_for(
    objective: Objective[MethodSettings], batches_of: Callable[..., list[Batch]]
) -> tuple[list[Batch], dict[str, list[Batch]]]:
    """The micro-batches of a step, and those of its further groups."""
    groups = make_groups(objective.rows)
    generator = torch.Generator().manual_seed(6)
    # as a reference would have scored: some nats a token, so that z of kto_pair is not 0
    refs = [-6.5 * torch.rand(g.num_scored, generator=generator, dtype=torch.float64) - 3 for g in groups]
    others = Mismatched(groups, num_epochs=1, seed=0, max_tokens=64) if objective.also else ()
    apart_refs = [-9.5 * torch.ones(g.num_scored, dtype=torch.float64) for g in others]
    also = {"mismatched": batches_of(others, apart_refs)} if others else {}
    return batches_of(groups, refs, objective.reads & Policy.SUPPLIES), also


def by_budget(tokens: int) -> Callable[..., list[Batch]]:
    def batches(groups: Sequence[Group], refs: Sequence[Tensor], wants: Iterable[str] = ()) -> list[Batch]:
        parts = cut(groups, range(len(groups)), tokens, packed_tokens)
        return [pack([groups[i] for i in part], ref_columns([refs[i] for i in part]), wants) for part in parts]

    return batches
