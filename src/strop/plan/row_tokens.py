"""How many tokens groups take in each row layout: shared-prefix rows, or plain padded rows. Floor 2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from strop.lengths import Lengths, Sized


@dataclass(frozen=True)
class RowTokens:
    """Counts the tokens that a model computes for groups in one row layout, including padding.

    shares_prompts: one row holds each prompt once, followed by its completions. Otherwise each completion is a row with
    its prompt, and all rows are padded to the longest one.
    """

    shares_prompts: bool

    def __call__(self, groups: Iterable[Sized]) -> int:
        """Tokens of a micro-batch of these groups."""
        if self.shares_prompts:
            return sum(group.num_tokens for group in groups)
        rows = [group.lengths.prompt + n - 1 for group in groups for n in group.lengths.completions]
        return len(rows) * max(rows)

    def of_each(self, lengths: Lengths) -> np.ndarray:
        """[G] tokens of each group as a micro-batch by itself."""
        if self.shares_prompts:
            return lengths.num_tokens
        return np.asarray(lengths.counts * padded_width(lengths))


def padded_width(lengths: Lengths) -> np.ndarray:
    """[G] tokens of each group's longest plain row. The last token of a completion is not fed to the model."""
    return np.asarray(lengths.longest.astype(np.int64) + lengths.prompt - 1)


packed_tokens = RowTokens(shares_prompts=True)
padded_tokens = RowTokens(shares_prompts=False)
