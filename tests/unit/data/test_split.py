"""The validation split: a function of seed and number of rows, prompts never on both sides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from strop.data.split import held_out

shares = st.floats(0, 0.99, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


@given(st.integers(0, 300), shares, seeds)
def test_the_share_is_held_out_and_never_all(num_rows: int, share: float, seed: int) -> None:
    flags = held_out(range(num_rows), share, seed).tolist()
    assert len(flags) == num_rows and flags == held_out([f"row {i}" for i in range(num_rows)], share, seed).tolist()
    expected = max(1, round(share * num_rows)) if share > 0 and num_rows > 1 else 0
    assert sum(flags) == min(expected, max(num_rows - 1, 0))


@given(st.lists(st.integers(0, 12), min_size=2, max_size=120), shares.filter(bool), seeds)
def test_rows_with_one_prompt_stay_together(keys: list[int], share: float, seed: int) -> None:
    flags = held_out(keys, share, seed).tolist()
    held = {key for key, flag in zip(keys, flags, strict=True) if flag}
    trained = {key for key, flag in zip(keys, flags, strict=True) if not flag}
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1)
    assert 1 <= sum(flags) <= wanted
    if min(keys.count(key) for key in keys) <= wanted:
        assert not held & trained


def test_seeds_hold_out_different_rows_and_the_choice_is_for_ever() -> None:
    def rows(seed: int) -> list[int]:
        return [i for i, flag in enumerate(held_out(range(40), 0.1, seed)) if flag]

    assert len({tuple(rows(seed)) for seed in range(20)}) > 15
    assert rows(42) == RECORDED


RECORDED = [1, 13, 29, 39]
