"""What an optimizer step was: one record per step, from which everything that is written of it derives. Floor 3.

The loop emits a `StepRecord` at the end of each step. The window of metrics.jsonl, the margins log, the trackers and
the terminal are made from it, and from nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Sum = tuple[float, int]
"""A metric of a step as (sum, count)."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    step: from 1. epoch, step_in_epoch: from 0. epochs: done after this step. indices: the source's numbers of the
    step's groups, in its order. cut: the micro-batches, as places in `indices`. seed: what dropout's random state is a
    function of, with the number of the micro-batch. loss, terms: the step's, and each term's share of it. grad_norm:
    before clipping. skipped: the weights were left as they are, since loss or norm was not finite. metrics: the
    method's, as (sum, count). margins: [groups] in the order of `indices`, where the method has them. num_tokens: fed
    to the model, padding left out. num_zero_signal_groups: groups that no preference can be learnt from. seconds: of
    the whole step. update: how far the weights moved, where it was measured. weights: a digest of the weights that
    trained, as they were before the update (`WeightsDigest`).
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
    metrics: Mapping[str, Sum]
    margins: NDArray[np.float64] | None
    num_groups: int
    num_zero_signal_groups: int
    num_scored_tokens: int
    num_tokens: int
    seconds: float
    weights: str
    update: Mapping[str, Sum] = field(default_factory=dict)


class WeightsDigest:
    """A hash of a sample of the weights: 16 evenly spaced values of each tensor that trains.

    Two runs whose digests agree in every step have, as far as the sample shows, taken the same path bit for bit; the
    first step in which they differ is the one after the cause. The sample is a view of the weights, made once; taking
    it copies some kilobytes.
    """

    PER_TENSOR = 16

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._views = [_spread(p.detach(), self.PER_TENSOR) for p in parameters]

    def sample(self) -> Tensor:
        """The values as they are now, one float32 (float64 for float64 weights) each, on the weights' device."""
        wide = any(view.dtype == torch.float64 for view in self._views)
        return torch.cat([view.to(torch.float64 if wide else torch.float32) for view in self._views])

    @staticmethod
    def of(sample: Tensor) -> str:
        """16 hexadecimal digits. sample: on the CPU."""
        return hashlib.blake2b(sample.numpy().tobytes(), digest_size=8).hexdigest()


def _spread(tensor: Tensor, most: int) -> Tensor:
    """At most `most` evenly spaced values of a tensor, as a view of it."""
    while not tensor.is_contiguous():
        tensor = tensor[0]
    flat = tensor.view(-1)
    return flat[:: max(1, -(-flat.numel() // most))]
