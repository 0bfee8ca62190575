"""Rows of Arrow tables: Parquet files, and what the package datasets keeps. Floor 2.

In: record batches. Out: rows as JSON Lines would have them. A table gives every row all columns and every object the
keys of all others, null where a row had none; and it holds the bytes of images and sounds, which nobody reads here.

    nulls below WITHOUT_NULLS              taken out: a schema or an argument that a row does not have is not null
    JSON (the type of Arrow)               read; a null that it holds is the row's own
    maps                                   objects; `to_pylist` gives pairs
    decimals                               numbers, as JSON has them
    columns of bytes                       not read: `NOT_READ` stands in their place
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

NOT_READ = b""
"""What stands in place of a column of bytes: something is there, and it is no text."""

WITHOUT_NULLS = frozenset({"tools", "tool_calls", "functions", "function_call", "chat_template_kwargs"})
PARTS_OF_A_MESSAGE = frozenset({"role", "from"})

Convert = Callable[[Any], Any]


class RowMaker:
    """Makes rows of the batches of one schema.

    columns: the names of the columns that are read.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.columns = [field.name for field in schema if not _is_bytes(field.type)]
        self._not_read = {field.name: NOT_READ for field in schema if _is_bytes(field.type)}
        found = {field.name: _convert(field.type, field.name in WITHOUT_NULLS) for field in schema}
        self._converts = {name: convert for name, convert in found.items() if convert is not None}

    def rows(self, batch: Any) -> list[dict[str, Any]]:
        """The rows of a record batch or table, which has all columns of the schema or those of `columns`."""
        chosen = batch.select(self.columns)
        try:
            rows: list[dict[str, Any]] = chosen.to_pylist()
        except (ValueError, OverflowError):
            rows = _readable(chosen).to_pylist()
        rows = rows or [{} for _ in range(batch.num_rows)]
        for row in rows:
            for name, convert in self._converts.items():
                if row.get(name) is not None:
                    row[name] = convert(row[name])
            row.update(self._not_read)
        return rows


def _readable(batch: Any) -> Any:
    """The batch with times as numbers where Python has no such day or time zone: no column of times is trained."""
    for i, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type):
            try:
                batch.column(i).to_pylist()
            except (ValueError, OverflowError):
                width = pa.int64() if field.type.bit_width == 64 else pa.int32()
                batch = batch.set_column(i, field.name, batch.column(i).cast(width))
    return batch


def _is_bytes(kind: Any) -> bool:
    """Whether a column is an image, a sound or the like; messages that hold some are read, to be refused by name."""
    leaves, names = set[bool](), set[str]()
    _look(kind, leaves, names)
    return True in leaves and not names & PARTS_OF_A_MESSAGE


def _look(kind: Any, leaves: set[bool], names: set[str]) -> None:
    if pa.types.is_struct(kind):
        for field in kind:
            names.add(field.name)
            _look(field.type, leaves, names)
    elif _is_list(kind):
        _look(kind.value_type, leaves, names)
    elif pa.types.is_map(kind):
        _look(kind.item_type, leaves, names)
    else:
        leaves.add(
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_fixed_size_binary(kind)
            or pa.types.is_binary_view(kind)
        )


def _is_list(kind: Any) -> bool:
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list or types.is_list_view(kind) or types.is_large_list_view(kind))


def _convert(kind: Any, drops_nulls: bool) -> Convert | None:
    """What makes a value of this type the row's own; None where it is so already."""
    if isinstance(kind, pa.BaseExtensionType):
        return json.loads if kind.extension_name == "arrow.json" else None
    if _is_list(kind):
        item = _convert(kind.value_type, drops_nulls)
        return None if item is None else _each(item)
    if pa.types.is_decimal(kind):  # SQL engines write 0.5 as one
        return float if kind.scale > 0 else int
    if pa.types.is_map(kind):
        return _map(_convert(kind.item_type, drops_nulls), drops_nulls)
    if not pa.types.is_struct(kind):
        return None
    found = {field.name: _convert(field.type, drops_nulls or field.name in WITHOUT_NULLS) for field in kind}
    converts = {name: convert for name, convert in found.items() if convert is not None}
    return _object(converts, drops_nulls) if converts or drops_nulls else None


def _each(item: Convert) -> Convert:
    return lambda values: [None if value is None else item(value) for value in values]


def _map(item: Convert | None, drops_nulls: bool) -> Convert:
    def convert(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        return {
            str(key): item(value) if item is not None and value is not None else value
            for key, value in pairs
            if value is not None or not drops_nulls
        }

    return convert


def _object(converts: dict[str, Convert], drops_nulls: bool) -> Convert:
    def convert(value: dict[str, Any]) -> dict[str, Any]:
        return {
            name: converts[name](item) if item is not None and name in converts else item
            for name, item in value.items()
            if item is not None or not drops_nulls
        }

    return convert
