"""Rows written by hand, and what becomes of them: an example, or the refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from strop.data.read.row import RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.types import Example, Origin, RowShape

HERE = Origin("rows.jsonl", 7)
Row = dict[str, Any]


def u(content: Any, **more: Any) -> Row:
    """A user turn."""
    return {"role": "user", "content": content, **more}


def a(content: Any, **more: Any) -> Row:
    """An assistant turn."""
    return {"role": "assistant", "content": content, **more}


def s(content: Any) -> Row:
    """A system turn."""
    return {"role": "system", "content": content}


def read(row: Mapping[str, Any], rows: RowShape = "single", **columns: Any) -> Example:
    """The example of a row. columns: their names, as in `RowColumns`."""
    return to_example(row, HERE, rows, RowColumns(**columns))


def refused(row: Mapping[str, Any], rows: RowShape = "single", **columns: Any) -> RowRefused:
    """The refusal of a row that has to be refused."""
    with pytest.raises(RowRefused) as refusal:
        read(row, rows, **columns)
    return refusal.value
