"""The columns of the rows that are sampled for, which rewards get by their names. Floor 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.config import DatasetSection
from strop.data.read.sources import choose_sources
from strop.data.store.table import Groups
from strop.types import Origin, RowShape


def rows_by_origin(dataset: DatasetSection, rows: RowShape, groups: Groups) -> Mapping[Origin, Mapping[str, Any]]:
    """The rows of these training groups, by where they stand. They are kept in memory.

    Their sources are read once more, each up to its last such row: a stream may go on for much longer.
    """
    found: dict[Origin, Mapping[str, Any]] = {}
    # one shard per source; the last sources have none where dataset.max_samples is reached before
    for source, missing in zip(choose_sources(dataset, rows).train, groups.origins(), strict=False):
        if not missing:
            continue
        for row in source.read():
            if row.data is not None and row.origin in missing:
                found[row.origin] = row.data
                missing.remove(row.origin)
                if not missing:
                    break
    return found
