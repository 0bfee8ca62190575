"""Arrays of a run's logs: what was written, or nothing, whatever became of the file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from strop.log_arrays import MOST_BYTES, read_floats


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_was_written(dtype: type, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5, dtype=dtype))
    found = read_floats(tmp_path / "a.npy")
    assert found is not None and found.dtype == dtype and found.tolist() == [0, 1, 2, 3, 4]


def test_damage_raises_nothing_and_warns_of_nothing(tmp_path: Path) -> None:
    """Every byte of the header in turn, and runs of noise: among them what Python's tokenizer trips over."""
    np.save(tmp_path / "a.npy", np.arange(4.0))
    whole, rng = (tmp_path / "a.npy").read_bytes(), random.Random(0)
    lost = 0
    for trial in range(600):
        at = trial % len(whole)
        noise = rng.randbytes(1 if trial < len(whole) else rng.randint(2, 24))
        (tmp_path / "a.npy").write_bytes(whole[:at] + noise + whole[at + len(noise) :])
        lost += read_floats(tmp_path / "a.npy") is None
    assert lost > 200


def test_a_length_that_no_memory_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4.0))
    whole = (tmp_path / "a.npy").read_bytes()
    for shape in (b"(9999999999999,)", b"(2147483647, 9)"):
        (tmp_path / "a.npy").write_bytes(whole.replace(b"(4,), }" + b" " * len(shape), shape + b", }" + b" " * 4))
        assert read_floats(tmp_path / "a.npy") is None


def test_something_else(tmp_path: Path) -> None:
    assert read_floats(tmp_path / "missing.npy") is None
    assert read_floats(tmp_path) is None
    for name, array in (("two", np.ones((2, 2))), ("int", np.arange(3)), ("text", np.array(["a"]))):
        np.save(tmp_path / name, array)
        assert read_floats(tmp_path / f"{name}.npy") is None
    np.save(tmp_path / "a.npy", np.arange(4.0))
    (tmp_path / "link.npy").symlink_to(tmp_path / "a.npy")
    assert read_floats(tmp_path / "link.npy") is None
    with open(tmp_path / "large.npy", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert read_floats(tmp_path / "large.npy") is None
