"""Which groups of a step each process takes, so that all of them work about as long. Floor 2."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from strop.lengths import Lengths
from strop.plan.row_tokens import RowTokens


@dataclass(frozen=True)
class GroupCost:
    """What groups cost, in units of one token's way through the layers.

    seen: cost of a key that a query attends to. scored: cost of a scored token in the head.
    """

    seen: float = 0.0
    scored: float = 0.0

    def of_each(self, lengths: Lengths, tokens: RowTokens) -> np.ndarray:
        """[G] the cost of each group. tokens: how its rows are laid out."""
        scored = lengths.sums(lengths.completions)
        return np.asarray(tokens.of_each(lengths) + self.seen * lengths.seen + self.scored * scored)


BY_TOKENS = GroupCost()
"""Where nothing is known of the model."""


def deal(costs: np.ndarray, num_processes: int) -> list[list[int]]:
    """The groups of each process, by rank: the most expensive group first, each to the process that has the least so
    far (longest processing time first; Graham 1969). Processes get none where there are fewer groups than processes."""
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [(0.0, rank) for rank in range(num_processes)]
    for group in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        shares[rank].append(group)
        heapq.heapreplace(loads, (load + float(costs[group]), rank))
    return shares
