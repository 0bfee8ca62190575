"""Which training rows are held out for evaluation. Floor 2.

In: one key per row (rows with equal keys share their prompt), the share and the seed. Out: a flag per row. The result
depends only on the seed and on which keys are equal; if all differ, only on the seed and the number of rows.
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
    by_key = _by_key(np.asarray(keys))
    del keys  # they take memory, and a caller may have passed its only reference on
    bundle_of = _bundles(*by_key)
    del by_key
    chosen = _fill(np.bincount(bundle_of).astype(bundle_of.dtype), wanted, seed)
    if not chosen.any():
        return _fill(np.ones(num_rows, bundle_of.dtype), wanted, seed)
    return np.asarray(chosen[bundle_of])


def _by_key(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rows] the numbers of the rows in the order of their keys, those with one key as they were; and a flag for each
    of them that is the first with its key. Numbers are 32 bits wide where that is enough."""
    rows = np.argsort(keys, kind="stable").astype(np.int32 if len(keys) < 2**31 else np.int64)
    in_order = keys[rows]
    is_first = np.empty(len(rows), bool)
    is_first[0] = True
    np.not_equal(in_order[1:], in_order[:-1], out=is_first[1:])
    return rows, is_first


def _bundles(rows: np.ndarray, is_first_in_order: np.ndarray) -> np.ndarray:
    """[rows] for each row the number of its key; keys are numbered as they appear. rows, is_first_in_order: by key.

    Arrays are given up early: with a million rows and more, this is where a start takes the most memory.
    """
    first_rows = rows[is_first_in_order]
    is_first = np.zeros(len(rows), bool)
    is_first[first_rows] = True
    number_of_key = np.cumsum(is_first, dtype=rows.dtype)[first_rows]
    number_of_key -= 1
    del first_rows, is_first
    key_of_place = np.cumsum(is_first_in_order, dtype=rows.dtype)
    key_of_place -= 1
    bundle_of = np.empty(len(rows), rows.dtype)
    bundle_of[rows] = number_of_key[key_of_place]
    return bundle_of


def sample(num_rows: int, share: float, seed: int) -> np.ndarray:
    """The numbers of `share` of the rows, chosen at random, in order."""
    return np.sort(np.argsort(_ranks(num_rows, seed), kind="stable")[: round(share * num_rows)])


def _fill(sizes: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Flags of bundles taken in a random order, as far as they fit."""
    order = np.argsort(_ranks(len(sizes), seed), kind="stable").astype(sizes.dtype)
    chosen = np.zeros(len(sizes), bool)
    totals = np.cumsum(sizes[order], dtype=sizes.dtype)
    num_first = int(np.searchsorted(totals, wanted, side="right"))  # up to the first that does not fit
    chosen[order[:num_first]] = True
    missing = wanted - (int(totals[num_first - 1]) if num_first else 0)
    rest = order[num_first:]
    for n in rest[sizes[rest] <= missing]:  # not as a list: it may be long, and few of it are looked at
        if sizes[n] <= missing:
            chosen[n] = True
            missing -= int(sizes[n])
            if not missing:
                break
    return chosen


def _ranks(num: int, seed: int) -> np.ndarray:
    # a hash and no random generator: its order does not change with the version of any library
    first_bytes = (hashlib.sha256(f"{seed}:{n}".encode()).digest()[:8] for n in range(num))
    return np.fromiter((int.from_bytes(b, "big") for b in first_bytes), np.uint64, num)
