"""The longest group that a device takes by itself, by the estimate of memory. Floor 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from strop.batch import PROMPT_LOGPS
from strop.engine.out_of_memory import decided_by_auto
from strop.estimate.devices import devices_of
from strop.estimate.memory import fits, peak_memory
from strop.machine import Machine
from strop.plan.row_tokens import RowTokens
from strop.plan.work import Work
from strop.policy.precision import Precision
from strop.prepared import Prepared

MOST = 2**24
"""Tokens at which the search ends."""


def longest_that_fits(prepared: Prepared, machine: Machine, precision: Precision, tokens: RowTokens) -> tuple[int, int]:
    """(tokens of the longest group that fits by itself, tokens of the longest group of the rows). It is divided into
    prompt and completions as the rows' longest one is. Where `gradient_checkpointing` is auto, all layers may be
    computed again.

    Raises:
        CannotBuildError: the architecture needs more than its configuration.
    """
    config, shape = prepared.config, prepared.shape()
    if decided_by_auto(config) and shape.recomputes:
        config = config.with_values({"training.gradient_checkpointing": True}, "auto")
    lengths = prepared.data.train.lengths
    longest = lengths[int(np.argmax(tokens.of_each(lengths)))]
    prompts = PROMPT_LOGPS in prepared.objective.reads
    one = Work.of([longest], tokens, prompts=prompts)

    def is_fitting(work: Work) -> bool:
        parts = (shape, config, prepared.objective, precision, machine, devices_of(prepared))
        return fits(peak_memory(work, *parts), machine.memory)

    return longest_size(one, is_fitting), int(one.tokens[0])


def longest_size(one: Work, is_fitting: Callable[[Work], bool]) -> int:
    """The tokens, within a hundredth, up to which a micro-batch of one group may be stretched; at most `MOST`."""
    here = int(one.tokens[0])
    low, high = 0, MOST
    if is_fitting(stretched(one, high / here)):
        return high
    while high - low > 1 + low // 100:
        middle = (low + high) // 2
        low, high = (middle, high) if is_fitting(stretched(one, middle / here)) else (low, middle)
    return low


def stretched(work: Work, by: float) -> Work:
    """The counts of micro-batches whose groups are `by` times as long."""
    tokens, scored, longest, again = (
        np.ceil(size * by).astype(np.int64) for size in (work.tokens, work.scored, work.longest, work.again)
    )
    return replace(
        work,
        tokens=tokens,
        scored=scored,
        longest=longest,
        again=again,
        seen=work.seen * by**2,
        squares=np.ceil(work.squares * by**2).astype(np.int64),
    )
