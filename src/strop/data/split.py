"""Which training rows are held out for evaluation. Floor 2.

In: one key a row (rows with equal keys share their prompt), the share and the seed. Out: a flag a row. A pure function
of the seed and the keys' pattern: with no key twice, of (seed, number of rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def held_out(keys: Sequence[Any] | np.ndarray, share: float, seed: int) -> np.ndarray:
    """True for the rows to evaluate on: `share` of them, at least one if there are two or more.

    Rows with one key stay together, so no prompt is trained and evaluated on; only where that is impossible (all rows
    share one prompt, say) are rows told apart.
    """
    num_rows = len(keys)
    wanted = min(max(1, round(share * num_rows)), num_rows - 1) if share > 0 else 0
    if wanted <= 0:
        return np.zeros(num_rows, bool)
    _, first, bundle, sizes = np.unique(np.asarray(keys), return_index=True, return_inverse=True, return_counts=True)
    by_appearance = np.argsort(first)
    number = np.empty_like(by_appearance)
    number[by_appearance] = np.arange(len(by_appearance))
    chosen = _fill(sizes[by_appearance], wanted, seed)
    if chosen.any():
        return np.asarray(chosen[number[bundle]])
    return _fill(np.ones(num_rows, int), wanted, seed)


def sample(num_rows: int, share: float, seed: int) -> np.ndarray:
    """The numbers of `share` of the rows, chosen at random, in order."""
    return np.sort(np.argsort(_ranks(num_rows, seed), kind="stable")[: round(share * num_rows)])


def _fill(sizes: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Flags of bundles taken in a random order, as far as they fit."""
    chosen = np.zeros(len(sizes), bool)
    total = 0
    for n in np.argsort(_ranks(len(sizes), seed), kind="stable"):
        if total + sizes[n] <= wanted:
            chosen[n] = True
            total += int(sizes[n])
            if total == wanted:
                break
    return chosen


def _ranks(num: int, seed: int) -> np.ndarray:
    # a hash and no random generator: its order does not change with the version of any library
    first_bytes = (hashlib.sha256(f"{seed}:{n}".encode()).digest()[:8] for n in range(num))
    return np.fromiter((int.from_bytes(b, "big") for b in first_bytes), np.uint64, num)
