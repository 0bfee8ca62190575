"""Cuts a step into micro-batches that fit into memory. The cut does not change the result of the step. Floor 2.

The rule for one step: take the groups in order of length, the longest first, so that running out of memory shows early.
Put each into the one of the last `OPEN` micro-batches that grows the least by it; among equals the fullest, then the
first. If none has room, begin a new micro-batch. So shared-prefix rows get filled, and padded rows get groups of
similar length. A group that is longer than the budget is a micro-batch by itself.

The rule is implemented twice. `_cut_one` takes one step and loops over its groups. `_cut_many` takes many steps at once
and loops over the place within a step, so that an epoch of a million groups is cut in a second. A test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from strop.lengths import Lengths, Sized, lengths_of, starts_of
from strop.plan.row_tokens import RowTokens, padded_width

OPEN = 8
"""How many micro-batches are considered for a group. The limit keeps the time linear in the number of groups."""
TOGETHER = 1 << 14
"""How many groups `_cut_many` takes at once, which bounds its memory."""
FEW = 16
"""Up to this many steps, `_cut_one` is faster than `_cut_many`."""

Ints = np.ndarray


def cut(
    groups: Sequence[Sized] | Mapping[int, Sized], indices: Iterable[int], budget: int, tokens: RowTokens
) -> list[list[int]]:
    """Cuts the groups of one step, given by their indices, into micro-batches of at most `budget` tokens."""
    chosen = np.fromiter(indices, np.int64)
    if isinstance(groups, Mapping):
        lengths = Lengths.of(groups[i] for i in chosen.tolist())
    else:
        lengths = lengths_of(groups).taken(chosen)
    parts: list[list[int]] = []
    order = np.argsort(-lengths.num_tokens, kind="stable")
    numbers = _cut_one(*_sizes(lengths, order, tokens), budget, tokens)
    for i, part in zip(chosen[order].tolist(), numbers, strict=True):
        if part == len(parts):
            parts.append([])
        parts[part].append(i)
    return parts


def cut_steps(
    lengths: Lengths, order: np.ndarray, starts: np.ndarray, budget: int, tokens: RowTokens
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Cuts many steps into micro-batches, a number of steps at a time.

    Args:
        order: indices of groups, step after step; step s has order[starts[s] : starts[s + 1]].

    Yields:
        For some consecutive steps: the indices of their groups, sorted by micro-batch [n]; where each micro-batch
        begins among them [micro-batches + 1]; and the number of micro-batches of each step [steps].
    """
    counts = np.diff(starts)
    most = int(counts.max(initial=1))
    stride = max(1, TOGETHER // most)
    for first in range(0, len(counts), stride):
        some = slice(first, first + stride)
        numbers = np.asarray(order[starts[first] : starts[min(first + stride, len(counts))]], np.int64)
        own = lengths.taken(numbers)
        step_of = np.repeat(np.arange(len(counts[some])), counts[some])
        by_length = np.lexsort((-own.num_tokens, step_of))  # stable, so equal lengths keep their order as in `cut`
        sizes = _sizes(own, by_length, tokens)
        cut_together = _cut_each if len(counts[some]) <= FEW else _cut_many
        part_of = cut_together(sizes, counts[some], budget, tokens)  # within its step, from 0
        step_of = step_of[by_length]
        num_parts = np.zeros(len(counts[some]), np.int64)
        np.maximum.at(num_parts, step_of, part_of + 1)
        part_of = part_of + (np.cumsum(num_parts) - num_parts)[step_of]
        by_part = np.argsort(part_of, kind="stable")
        part_starts = np.searchsorted(part_of[by_part], np.arange(int(num_parts.sum()) + 1))
        yield numbers[by_length][by_part], part_starts, num_parts


def _sizes(lengths: Lengths, order: Ints, tokens: RowTokens) -> tuple[Ints, Ints]:
    """Two numbers per group, in this order, from which the size of a micro-batch follows. Shared-prefix rows: the
    group's tokens, twice. Plain rows: the number of its rows, and the tokens of the longest one."""
    if tokens.shares_prompts:
        size = lengths.num_tokens[order]
        return size, size
    return np.asarray(lengths.counts, np.int64)[order], padded_width(lengths)[order]


def _cut_one(counts: Ints, widths: Ints, budget: int, tokens: RowTokens) -> list[int]:
    """The micro-batch of each group of one step, from 0. counts, widths: from `_sizes`, the longest group first."""
    shares = tokens.shares_prompts
    rows: list[int] = []  # of each micro-batch: its tokens if prompts are shared, else the number of its rows
    longest: list[int] = []  # of each micro-batch: the tokens of its longest row
    used: list[int] = []  # of each micro-batch: its tokens, with padding
    found: list[int] = []
    for count, width in zip(counts.tolist(), widths.tolist(), strict=True):
        best, least, fullest = -1, 0, 0
        for at in range(max(0, len(used) - OPEN), len(used)):
            longer = used[at] + count if shares else (rows[at] + count) * max(longest[at], width)
            more = longer - used[at]
            if longer <= budget and (best < 0 or more < least or (more == least and used[at] > fullest)):
                best, least, fullest = at, more, used[at]
        if best < 0:
            best = len(used)
            rows.append(0)
            longest.append(0)
            used.append(0)
        rows[best] += count
        longest[best] = max(longest[best], width)
        used[best] = rows[best] if shares else rows[best] * longest[best]
        found.append(best)
    return found


def _cut_each(sizes: tuple[Ints, Ints], counts: np.ndarray, budget: int, tokens: RowTokens) -> Ints:
    """Calls `_cut_one` for each step. counts: the number of groups of each step."""
    starts = starts_of(counts).tolist()
    parts = [_cut_one(sizes[0][a:b], sizes[1][a:b], budget, tokens) for a, b in pairwise(starts)]
    return np.array([part for some in parts for part in some], np.int64)


def _cut_many(sizes: tuple[Ints, Ints], counts: np.ndarray, budget: int, tokens: RowTokens) -> Ints:
    """The same result as `_cut_each`, for all steps at once: place k of every step, then place k + 1.

    For each of the S steps, the last `OPEN` micro-batches are kept in as many columns, which are used in turn.
    """
    shares, num_steps, most = tokens.shares_prompts, len(counts), int(counts.max())
    places = np.arange(most) < np.asarray(counts)[:, None]  # [S, most]: whether the step has this many groups
    count, width, part = (np.zeros((num_steps, most), np.int64) for _ in range(3))
    count[places], width[places] = sizes
    rows, longest, used = (np.zeros((num_steps, OPEN), np.int64) for _ in range(3))
    number = np.full((num_steps, OPEN), -1)  # of the micro-batch in each column; -1: none yet
    num_parts = np.zeros(num_steps, np.int64)
    every, never = np.arange(num_steps), np.iinfo(np.int64).max
    for k in range(most):
        own, wide = count[:, k, None], width[:, k, None]
        longer = used + own if shares else (rows + own) * np.maximum(longest, wide)
        fits = (longer <= budget) & (number >= 0)
        more = np.where(fits, longer - used, never)
        best = fits & (more == more.min(axis=1, keepdims=True))
        full = np.where(best, used, -1)
        best &= full == full.max(axis=1, keepdims=True)
        column = np.where(best, number, never).argmin(axis=1)
        opens = ~best.any(axis=1)
        column = np.where(opens, num_parts % OPEN, column)
        here = places[:, k]
        at = every[here], column[here]
        fresh = every[here & opens], column[here & opens]
        rows[fresh] = longest[fresh] = 0
        number[fresh] = num_parts[here & opens]
        num_parts += here & opens
        rows[at] += count[here, k]
        longest[at] = np.maximum(longest[at], width[here, k])
        used[at] = rows[at] if shares else rows[at] * longest[at]
        part[here, k] = number[at]
    return part[places]
