"""A change between two evaluations of the same rows: how sure it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from strop.runfiles import EVALUATIONS, row_losses_array, step_of_row_losses
from strop.significance import change, change_of_rows, quantile


def test_the_quantiles_are_those_of_students_t() -> None:
    for degrees, known in ((3, 3.182), (5, 2.571), (15, 2.131), (60, 2.000), (1000, 1.962)):
        assert quantile(degrees) == pytest.approx(known, rel=0.04)


@pytest.mark.parametrize("num_rows", [8, 16, 64])
def test_noise_is_taken_for_a_rise_in_one_of_forty(num_rows: int) -> None:
    draw, rises, times = np.random.default_rng(0), 0, 4000
    for _ in range(times):
        before = draw.normal(2, 1, num_rows)  # rows differ by 1, an evaluation by 0.05
        found = change(before, before + draw.normal(0, 0.05, num_rows))
        assert found is not None
        rises += found.is_rise
    assert 0.015 < rises / times < 0.035


def test_a_small_rise_of_every_row_is_seen_where_rows_differ_much() -> None:
    draw = np.random.default_rng(1)
    before = draw.normal(2, 1, 16)
    found = change(before, before + 0.05 + draw.normal(0, 0.02, 16))
    assert found is not None and found.is_rise and found.mean == pytest.approx(0.05, abs=0.02)
    sample = change(before, before + 0.05 + draw.normal(0, 0.02, 16), num_rows=64)
    assert sample is not None and sample.half_width < found.half_width


def test_the_rows_of_a_sample_say_how_far_rows_differ_and_not_how_far_all_have_moved() -> None:
    draw, times, sampled, whole = np.random.default_rng(2), 1000, 0, 0
    kept = np.linspace(0, 3999, 256).astype(int)
    for _ in range(times):
        before = draw.normal(2, 1, 4000)
        after = before + draw.normal(0, 0.05, 4000)
        found = change(before[kept], after[kept], num_rows=4000)
        assert found is not None
        sampled += found.is_rise
        whole += found.of(before.mean(), after.mean()).is_rise
    assert 0.01 < whole / times < 0.045
    assert sampled / times > 0.2


def test_nothing_is_said_of_other_rows_or_too_few() -> None:
    rows = np.arange(8.0)
    assert change(rows, rows[:-1]) is None and change(rows[:3], rows[:3]) is None
    assert change(rows, np.where(rows == 2, np.nan, rows)) is None


def test_arrays_are_read_as_far_as_they_are_there(tmp_path: Path) -> None:
    folder = tmp_path / EVALUATIONS
    folder.mkdir()
    assert change_of_rows(tmp_path, 0, 5) is None
    for step, values in ((0, np.arange(8.0)), (5, np.arange(8.0) + 1)):
        np.save(folder / row_losses_array(step), values)
    found = change_of_rows(tmp_path, 0, 5)
    assert found is not None and found.mean == 1
    (folder / row_losses_array(5)).write_bytes(b"damaged")
    assert change_of_rows(tmp_path, 0, 5) is None
    assert [step_of_row_losses(name) for name in (row_losses_array(12), "step_00012.npy.x", "step_12.npy")] == [
        12,
        None,
        None,
    ]
