"""Rows for whose prompts completions will be sampled. Floor 2.

In: groups as they were read. Out: the same groups, with the lengths that they can have at most. Plans and estimates
work with these before anything is sampled.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from strop.data.store.table import Groups
from strop.errors import DataError
from strop.lengths import Lengths


class PromptGroups(Groups):
    """Groups whose completions will be sampled.

    Args:
        num_completions: per prompt. sequence: tokens of a prompt and a completion together, at most. completion: tokens
            of a completion, at most.

    Raises:
        DataError: a prompt leaves no room for a completion.
    """

    def __init__(self, groups: Groups, num_completions: int, sequence: int, completion: int | None) -> None:
        super().__init__(groups.shards, groups.shard_of, groups._row_of)
        self._num, self._sequence, self._completion = num_completions, sequence, completion
        if len(self) and (least := int(self.rooms.min())) < 1:
            row = groups[int(self.rooms.argmin())]
            raise DataError(
                f"the prompt has {len(row.prompt_ids)} tokens, which leaves {max(least, 0)} for a completion",
                where=str(row.origin),
                expected=f"room within training.max_seq_length {sequence}",
                fix="lower training.max_prompt_length, or raise training.max_seq_length",
            )

    @property
    def rooms(self) -> np.ndarray:
        """[G] tokens that a completion of each prompt may have."""
        left: np.ndarray = self._sequence - self.column("prompt").astype(np.int64)
        return left if self._completion is None else np.minimum(left, self._completion)

    def common_columns(self) -> list[str]:
        """The columns that every row has, where rows are kept for rewards."""
        if not len(self):
            return []
        found = set(self.kept(0).columns)
        for index in range(1, len(self)):
            found &= self.kept(index).columns.keys()
        return sorted(found)

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths that the groups can have at most."""
        starts = np.arange(len(self) + 1, dtype=np.int64) * self._num
        return Lengths(self.column("prompt").astype(np.int64), np.repeat(self.rooms, self._num), starts)
