"""Weights in the dtype of the matrix products, copied once while they stand still. Floor 2.

In 16 bits torch.autocast copies every float32 weight in every forward pass. Between two updates the copies are the
same, so whoever knows that no weight changes (a step's forward and backward passes, a pass of scoring) says so, and
each copy is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Casts:
    """Detached copies of weights. Outside `still` each is made anew."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None = None
        self._zero: dict[int, bool] = {}

    @contextmanager
    def still(self) -> Iterator[None]:
        """No weight changes inside. A block in a block belongs to the outer one."""
        if self._kept is not None:
            yield
            return
        self._kept, self._zero = {}, {}
        try:
            yield
        finally:
            self._kept, self._zero = None, {}

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight itself where it has the dtype, else a copy; without gradients."""
        if weight.dtype == dtype:
            return weight.detach()
        if self._kept is None:
            return weight.detach().to(dtype)
        key = (id(weight), dtype)
        if key not in self._kept:
            self._kept[key] = (weight, weight.detach().to(dtype))  # the weight too, so that its id stays its own
        return self._kept[key][1]

    def is_zero(self, weight: Tensor) -> bool:
        """Whether every number is 0, as in half of a new adapter; looked up once inside `still`, outside not at all."""
        if self._kept is None:
            return False
        if id(weight) not in self._zero:
            self._kept.setdefault((id(weight), weight.dtype), (weight, weight.detach()))
            self._zero[id(weight)] = not bool(weight.detach().any())
        return self._zero[id(weight)]
