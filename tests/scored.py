"""Scores and columns made by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strop.batch import Scores, own_columns, structure_of
from strop.columns import NO_COLUMNS, Columns, Structure
from strop.config.methods import MethodSettings
from strop.objectives.base import Objective
from strop.types import Group


def make_scores(
    logps: Tensor,
    lengths: Sequence[int],
    sizes: Sequence[int],
    columns: Columns = NO_COLUMNS,
    *,
    prompt_lengths: Sequence[int] | None = None,
    also: Mapping[str, Scores] | None = None,
) -> Scores:
    """lengths: scored tokens of each completion. sizes: completions of each group. prompt_lengths: of each, 1 unless
    they are given."""
    structure = Structure(tuple(sizes), tuple(lengths), tuple(prompt_lengths or [1] * len(sizes)))
    columns.check(structure)
    return Scores(structure, logps, structure.completion_index(), structure.group_index(), columns, also or {})


def beside(objective: Objective[MethodSettings], groups: Sequence[Group], refs: Sequence[Tensor]) -> list[Columns]:
    """Per group: a reference's log-probs, and what the objective derives from the whole step."""
    structure = structure_of(groups)
    own = ref_columns(refs)
    if objective.derives:
        own = own.beside(objective.derive(structure, own.beside(own_columns(groups))))
    return own.split(structure)


def ref_columns(refs: Sequence[Tensor]) -> Columns:
    """A reference's log-probs, one tensor per group."""
    return Columns(per_token={"ref_logps": torch.cat(list(refs))})
