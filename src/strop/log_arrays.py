"""Arrays of a run's logs, read from files that may be damaged. Floor 0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 1 << 26
"""Of one array; none that a run writes comes near it."""


def read_floats(path: Path) -> NDArray[np.floating[Any]] | None:
    """[n] the numbers of a file that `numpy.save` wrote; None where it is missing, damaged or something else.

    numpy reads the header of such a file as a Python literal, so that a damaged one raises whatever Python's parser and
    tokenizer do, or warns as they do.
    """
    try:
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            return None
        with warnings.catch_warnings(action="ignore"):
            found = np.load(path, allow_pickle=False)
    except Exception:  # noqa: BLE001 (see above)
        return None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "f":
        return None
    return found
