"""16-bit copies of weights for matrix products, each made once between two updates. Floor 2.

In 16 bits, torch.autocast copies every float32 weight in every forward pass. The copies change only with the weights.
So code that knows that no weight changes (the passes of a step, scoring) runs in a block `weights_fixed`, in which each
copy is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightCopies:
    """Detached copies of weights. Outside of `weights_fixed`, every use makes a new copy.

    On a CPU the memory of a copy is used again for the next one: fresh pages cost more than the copying.

    keeps: whether copies are kept at all. Those of weights that are gathered only while they are used are not.
    """

    def __init__(self) -> None:
        self.keeps = True
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._current: set[tuple[int, torch.dtype]] | None = None
        self._zero: dict[int, tuple[Tensor, bool]] = {}

    @contextmanager
    def weights_fixed(self) -> Iterator[None]:
        """A block in which no weight changes. Blocks may be nested; the outermost one counts."""
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
        """The weight in this dtype, without gradients: itself if it has the dtype, else a copy."""
        if weight.dtype == dtype:
            return weight.detach()
        if self._current is None or not self.keeps or not isinstance(weight, nn.Parameter):
            return weight.detach().to(dtype)  # what is no parameter was made for this pass alone
        key = (id(weight), dtype)
        if key not in self._copies:
            self._copies[key] = (weight, weight.detach().to(dtype))  # the weight too, so that its id stays its own
        elif key not in self._current:
            self._copies[key][1].copy_(weight.detach())
        self._current.add(key)
        return self._copies[key][1]

    def forget(self) -> None:
        """Drops all copies, because the weights that they are of are gone."""
        self._copies.clear()
        if self._current is not None:
            self._current.clear()

    def __deepcopy__(self, _: dict[int, Any]) -> WeightCopies:
        """An empty one: a copied model has weights of its own."""
        return WeightCopies()

    def is_zero(self, weight: Tensor) -> bool:
        """Whether all numbers of the weight are 0, as in half of a new adapter.

        The answer waits for a GPU, so it is looked up once per block; once it is no, never again. Outside of a block it
        is always False.
        """
        if self._current is None:
            return False
        if id(weight) not in self._zero:
            self._zero[id(weight)] = (weight, not bool(weight.detach().any()))
        return self._zero[id(weight)][1]
