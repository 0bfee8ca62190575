"""What groups cost in tokens: as rows that share prompts, or as plain rows that are padded. Floor 2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from strop.lengths import Lengths, Sized


@dataclass(frozen=True)
class RowTokens:
    """How the tokens that a model computes for a micro-batch are counted, padding included.

    shares_prompts: one row holds each prompt once, followed by its completions; else every completion is a row with
    its prompt, and all rows are padded to the longest.
    """

    shares_prompts: bool

    def __call__(self, groups: Iterable[Sized]) -> int:
        """Tokens of a micro-batch of these groups."""
        if self.shares_prompts:
            return sum(group.num_tokens for group in groups)
        rows = [group.lengths.prompt + n - 1 for group in groups for n in group.lengths.completions]
        return len(rows) * max(rows)

    def of_each(self, lengths: Lengths) -> np.ndarray:
        """[G] tokens of each group alone."""
        if self.shares_prompts:
            return lengths.num_tokens
        return np.asarray(lengths.counts * padded_width(lengths))


def padded_width(lengths: Lengths) -> np.ndarray:
    """[G] tokens of each group's longest plain row; the last token of a completion is fed to no model."""
    return np.asarray(lengths.longest.astype(np.int64) + lengths.prompt - 1)


packed_tokens = RowTokens(shares_prompts=True)
padded_tokens = RowTokens(shares_prompts=False)
