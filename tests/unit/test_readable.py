"""Numbers for a person: no exponents, and back within the digits shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.readable import duration, plain


@pytest.mark.parametrize(
    ("number", "text"),
    [(4.63e3, "4,630"), (5870.4, "5,870"), (0.0123, "0.0123"), (12.34, "12.3"), (999.6, "1,000"), (0.0, "0"), (2, "2")],
)
def test_plain_numbers(number: float, text: str) -> None:
    assert plain(number) == text


@given(st.floats(1e-9, 1e15))
def test_a_number_is_what_its_text_says(number: float) -> None:
    text = plain(number)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(number, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 s"),
        (12, "12 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3599.9, "1 h"),
        (7200, "2 h"),
        (2.31e3 * 60, "1 d 14 h"),
        (86_399, "1 d"),
        (40 * 86_400, "40 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0.01, 1e9))
def test_a_duration_is_what_its_text_says(seconds: float) -> None:
    sizes = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}
    words = duration(seconds).replace(",", "").split()
    total = sum(float(many) * sizes[unit] for many, unit in zip(words[::2], words[1::2], strict=True))
    assert total == pytest.approx(seconds, rel=0.06)
