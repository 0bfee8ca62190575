"""Which training rows are held out for evaluation. Floor 2.

In: one key a row (rows with equal keys share their prompt), the share and the seed. Out: a flag a row. A pure function
of the seed and the keys' pattern: with no key twice, of (seed, number of rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence


def held_out(keys: Sequence[Hashable], share: float, seed: int) -> list[bool]:
    """True for the rows to evaluate on: `share` of them, at least one if there are two or more.

    Rows with one key stay together, so no prompt is trained and evaluated on; only where that is impossible (all rows
    share one prompt, say) are rows told apart.
    """
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1) if share > 0 else 0
    if wanted <= 0:
        return [False] * len(keys)
    by_key: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        by_key.setdefault(key, []).append(i)
    chosen = _fill(list(by_key.values()), wanted, seed) or _fill([[i] for i in range(len(keys))], wanted, seed)
    return [i in chosen for i in range(len(keys))]


def _fill(bundles: Sequence[Sequence[int]], wanted: int, seed: int) -> set[int]:
    """Bundles in a random order, as far as they fit."""
    chosen: set[int] = set()
    for n in sorted(range(len(bundles)), key=lambda n: _rank(seed, n)):
        if len(chosen) + len(bundles[n]) <= wanted:
            chosen.update(bundles[n])
    return chosen


def _rank(seed: int, n: int) -> bytes:
    # a hash and no random generator: its order does not change with the version of any library
    return hashlib.sha256(f"{seed}:{n}".encode()).digest()
