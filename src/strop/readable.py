"""Numbers, and names of dtypes, as a person reads them; what counts as a number. Floor 0: stdlib only."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    import torch

UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of JSON or YAML is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16."""
    return str(dtype).removeprefix("torch.")


def plain(number: float, digits: int = 3) -> str:
    """Three digits, without an exponent, thousands apart: `0.0123`, `4.63`, `5,870`."""
    size = float(f"{number:.{digits}g}")
    if abs(size) >= 10 ** (digits - 1):
        return f"{size:,.0f}"
    text = f"{Decimal(repr(size)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """The two largest units: `12 s`, `3 min 20 s`, `1 d 14 h`."""
    if seconds < 10:
        return f"{plain(seconds, 2)} s"
    left = round(seconds)
    for at, (unit, size) in enumerate(UNITS):
        if left >= size:
            if at + 1 == len(UNITS):
                return f"{left} {unit}"
            smaller, part = UNITS[at + 1]
            many, rest = divmod(round(left / part), size // part)
            if at and many * size >= UNITS[at - 1][1]:  # rounded up to the next larger unit
                return duration(many * size)
            return f"{many:,} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError("ten seconds and more are at least a second")
