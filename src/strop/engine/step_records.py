"""One record per optimizer step. Everything that is written or shown about a step is made from it. Floor 3.

The loop emits a `StepRecord` at the end of each step. The lines of metrics.jsonl, the ledger, the margins log, the
trackers and the terminal are made from it and from nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strop.objectives.base import FetchedMean
from strop.policy.strategy import Strategy


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    step: from 1. epoch, step_in_epoch: from 0. epochs: number of epochs done after this step, a fraction.
    indices: the numbers of the step's groups in their source. cut: the micro-batches, as places in `indices`.
    seed: decides, with the place of a micro-batch, the random state of dropout.
    loss: of the step. terms: the share of each term in it. grad_norm: before clipping. skipped: the weights were not
    updated, because loss or norm was not finite. metrics: those of the method, as (sum, count).
    margins: [groups] in the order of `indices`, if the method has them. num_tokens: tokens fed to the model, without
    padding. num_zero_signal_groups: groups whose completions are all alike. seconds: duration of the whole step.
    update: how far the weights moved, if it was measured. weights: a digest of the trained weights before the update
    (`WeightsDigest`). rows: a hash of each group, in the order of `indices` (`ledger.row_hash`), in the main process.
    budget_tokens: the size that micro-batches were cut to.
    """

    step: int
    epoch: int
    step_in_epoch: int
    epochs: float
    indices: tuple[int, ...]
    cut: tuple[tuple[int, ...], ...]
    seed: tuple[int, int]
    learning_rate: float
    loss: float
    terms: Mapping[str, float]
    grad_norm: float
    clipped: bool
    skipped: bool
    metrics: Mapping[str, FetchedMean]
    margins: NDArray[np.float64] | None
    num_groups: int
    num_zero_signal_groups: int
    num_scored_tokens: int
    num_tokens: int
    seconds: float
    weights: str
    update: Mapping[str, FetchedMean] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    budget_tokens: int = 0


class WeightsDigest:
    """A hash of a sample of the weights: 16 evenly spaced values of each trained tensor.

    If the digests of two runs agree in every step, the runs are equal bit for bit, as far as the sample shows. The
    first step whose digests differ is the one after the cause. A digest costs a copy of some kilobytes.
    """

    PER_TENSOR = 16

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._views, places, self._size = [], [], 0
        for piece in strategy.pieces.values():
            stride = max(1, -(-piece.size // self.PER_TENSOR))
            if piece.counts:
                view, place = piece.every(stride)
                self._views.append(view)
                places.append(place + self._size)
            self._size += -(-piece.size // stride)
        self._places = torch.cat(places)

    def sample(self) -> Tensor:
        """The current values, in float32 (or float64, for float64 weights), on the device of the weights."""
        wide = any(view.dtype == torch.float64 for view in self._views)
        values = torch.cat([view.to(torch.float64 if wide else torch.float32) for view in self._views])
        return self._strategy.placed(values, self._places, self._size)

    @staticmethod
    def of(sample: Tensor) -> str:
        """The digest of a sample that is on the CPU: 16 hexadecimal digits."""
        return hashlib.blake2b(sample.numpy().tobytes(), digest_size=8).hexdigest()
