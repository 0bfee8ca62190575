"""Weights in the dtype of the matrix products, copied once while they stand still. Floor 2.

In 16 bits torch.autocast copies every float32 weight in every forward pass. Between two updates the copies are the
same, so whoever knows that no weight changes (a step's forward and backward passes, a pass of scoring) says so, and
each copy is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Casts:
    """Detached copies of weights. Outside `still` each is made anew.

    On a CPU the memory of a copy is used again for the next: fresh pages cost more than the copying.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._current: set[tuple[int, torch.dtype]] | None = None
        self._zero: dict[int, tuple[Tensor, bool]] = {}

    @contextmanager
    def still(self) -> Iterator[None]:
        """No weight changes inside. A block in a block belongs to the outer one."""
        if self._current is not None:
            yield
            return
        self._current = set()
        try:
            yield
        finally:
            self._current = None
            self._zero = {key: pair for key, pair in self._zero.items() if not pair[1]}
            self._copies = {key: pair for key, pair in self._copies.items() if pair[1].device.type == "cpu"}

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight itself where it has the dtype, else a copy; without gradients."""
        if weight.dtype == dtype:
            return weight.detach()
        if self._current is None:
            return weight.detach().to(dtype)
        key = (id(weight), dtype)
        if key not in self._copies:
            self._copies[key] = (weight, weight.detach().to(dtype))  # the weight too, so that its id stays its own
        elif key not in self._current:
            self._copies[key][1].copy_(weight.detach())
        self._current.add(key)
        return self._copies[key][1]

    def __deepcopy__(self, _: dict[int, Any]) -> Casts:
        """None: a copy of a model has weights of its own."""
        return Casts()

    def is_zero(self, weight: Tensor) -> bool:
        """Whether every number is 0, as in half of a new adapter; looked up once inside `still`, outside not at all,
        and never again once one is not: a GPU is waited for."""
        if self._current is None:
            return False
        if id(weight) not in self._zero:
            self._zero[id(weight)] = (weight, not bool(weight.detach().any()))
        return self._zero[id(weight)][1]
