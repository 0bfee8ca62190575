"""The numbers of a row beside its completions: rewards, and log-probs of the tokens. Floor 2.

In: a row, and the names of the columns that the method takes. Out: their numbers by name. How many tokens each
completion has is known later only (`store/group_numbers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from strop.data.read.row import RowRefused
from strop.data.shapes.json_columns import parsed
from strop.data.shapes.messages import wrong_type
from strop.types import LARGEST, OF_COMPLETIONS, OF_GROUPS

Numbers = Mapping[str, tuple[Any, ...]]
"""Name -> per completion a number (`OF_COMPLETIONS`) or a tuple of one per trained token (`OF_TOKENS`); or one number
(`OF_GROUPS`)."""


def numbers_of(data: Mapping[str, Any], num_completions: int, names: Sequence[str]) -> Numbers:
    """The numbers of a row in the columns of these names; one that is null or not there gives none. A reward may be
    true or false: 1 or 0.

    Raises:
        RowRefused: not as many as there are completions, or not finite numbers.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for name in names:
        value = data.get(name)
        if isinstance(value, str):  # a CSV file has texts only
            value = parsed(value, name) if value.strip() else None
        if value is None:
            continue
        if name in OF_GROUPS:
            found[name] = (_number(value, name),)
            continue
        values = _listed(value, name)
        if len(values) != num_completions:
            raise RowRefused(
                "wrong_shape",
                f"{name} has {len(values)} entries, and there are {num_completions} completions",
                expected="one entry per completion",
            )
        if name in OF_COMPLETIONS:
            found[name] = tuple(_number(v, f"{name}[{i}]") for i, v in enumerate(values))
        else:
            found[name] = tuple(_logps(v, f"{name}[{i}]") for i, v in enumerate(values))
    return found


def _listed(value: Any, name: str) -> Sequence[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        raise wrong_type(name, value, "a list with one entry per completion")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not abs(value) <= LARGEST:  # NaN is not, either
        raise wrong_type(name, value, f"a finite number, of a size of at most {LARGEST:g}")
    return float(value)


def _logps(value: Any, name: str) -> tuple[float, ...]:
    values = tuple(_number(v, f"{name}[{i}]") for i, v in enumerate(_listed(value, name)))
    if high := [v for v in values if v > 0]:
        raise RowRefused(
            "wrong_type", f"{name} holds {high[0]:g}, which is no log-prob", expected="natural logarithms, at most 0"
        )
    return values
