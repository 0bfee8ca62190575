"""Completions that were cut off, left out of the loss of a whole step. Floor 2.

Shapes: C completions, M scored tokens, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.columns import Structure


def counted(aggregation: str, ended: Tensor, structure: Structure) -> Tensor:
    """[M] float64: 0 at the tokens of completions that were cut off; at the others, the factor that makes the mean over
    all of them the mean over those that are left. All 0 where nothing is left.

    Args:
        aggregation: what the losses of tokens are averaged over; `constant` divides by a fixed count, so its factor
            is 1.
        ended: [C] bool.
    """
    lengths = torch.tensor(structure.tokens_per_completion, dtype=torch.float64)
    kept, group, of_token = ended.double(), structure.group_index(), structure.completion_index()
    match aggregation:
        case "token":
            factor = kept * _ratio(lengths.sum(), (lengths * kept).sum())
        case "sequence" | "sequence_sum":
            factor = kept * _ratio(torch.tensor(float(len(kept)), dtype=torch.float64), kept.sum())
        case "prompt":
            zeros = lengths.new_zeros(structure.num_groups)
            whole, left = zeros.index_add(0, group, lengths), zeros.index_add(0, group, lengths * kept)
            prompts = _ratio(torch.tensor(float(len(left)), dtype=torch.float64), (left > 0).sum().double())
            factor = kept * _ratio(whole, left)[group] * prompts
        case _:
            factor = kept
    return factor[of_token]


def _ratio(whole: Tensor, left: Tensor) -> Tensor:
    return torch.where(left > 0, whole / left.clamp(min=1), 0.0)
