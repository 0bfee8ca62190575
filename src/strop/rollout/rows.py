"""The columns of every row, which rewards get by their names. Floor 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strop.config import DatasetSection
from strop.data.read.sources import choose_sources
from strop.types import Origin, RowShape


def rows_by_origin(dataset: DatasetSection, rows: RowShape) -> Mapping[Origin, Mapping[str, Any]]:
    """All rows of the training sources, by where they stand; they are read once more, and kept in memory."""
    return {
        row.origin: row.data
        for source in choose_sources(dataset, rows).train
        for row in source.read()
        if row.data is not None
    }
