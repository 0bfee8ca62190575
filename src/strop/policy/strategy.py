"""How the weights of a policy lie over the processes that train it. Floor 2.

The engine asks the policy's `Strategy` for whatever depends on that, so that a step reads the same in all cases:

    Replicated   every process holds all weights; gradients are summed once per step (this module)
    Sharded      every process holds a part of them (sharding.py)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from strop.policy.gradient_norm import clip, gradient_norm
from strop.world import World

if TYPE_CHECKING:
    from strop.policy.policy import Policy


@dataclass(frozen=True)
class Piece:
    """What a process holds of one weight that trains.

    tensor: what the optimizer updates here. start: where it begins in the whole weight, in elements, counted row by
    row. size: elements of the whole weight. counts: whether this process adds it to sums over the whole model. Of the
    processes that hold the same piece, one does in each replica.
    """

    tensor: nn.Parameter
    start: int
    size: int
    counts: bool

    @classmethod
    def whole(cls, weight: nn.Parameter) -> Piece:
        return cls(weight, 0, weight.numel(), counts=True)

    def every(self, stride: int) -> tuple[Tensor, Tensor]:
        """Those of every `stride`-th element of the whole weight that lie here: [n] their values, as a view, and [n]
        their numbers, where the elements that are taken from the whole weight are counted from 0."""
        flat = _flat(self.tensor.detach())
        first = -(-self.start // stride)
        values = flat[first * stride - self.start :: stride]
        return values, torch.arange(first, first + len(values), device=values.device)


def _flat(tensor: Tensor) -> Tensor:
    """The tensor as a flat view. Of a tensor that is not contiguous: its first part that is."""
    while not tensor.is_contiguous():
        tensor = tensor[0]
    return tensor.view(-1)


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in this dtype, if it is one of floating point numbers; None: as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


class Strategy(ABC):
    """How the weights of one policy lie over the processes of `world`.

    repeats: whether a pass that ran out of memory in one process can be repeated. It cannot where the other processes
    are inside the collective calls of a layer then.
    """

    repeats: bool

    def __init__(self, policy: Policy, world: World) -> None:
        self.policy, self.world = policy, world

    # -- the model ---------------------------------------------------------------------------------------------------

    def gathered(self, module: nn.Module) -> AbstractContextManager[object]:
        """A block in which a module inside a layer has its whole weights, outside of a pass. Collective."""
        return nullcontext()

    def all_gathered(self) -> AbstractContextManager[object]:
        """A block in which this process has all weights whole, and may call the model as often as it likes. Collective
        at its beginning and its end."""
        return nullcontext()

    @abstractmethod
    def idle(self, backward: bool, wants: Set[str] = frozenset()) -> None:
        """Takes part in a pass of the other processes, when this one has no micro-batch left.

        backward: whether it is a forward and a backward pass. wants: the columns that the micro-batches of the others
        want of the policy.
        """

    def num_idle(self, num_passes: int) -> int:
        """How often this process has to call `idle`, because another makes more passes than its own `num_passes`. Asked
        before the first of them. Collective."""
        return 0

    def forget_passes(self) -> None:  # noqa: B027 (processes that hold all weights note nothing)
        """Frees what was noted of passes that no backward pass follows."""

    def outlasting(self, weight: Tensor) -> Tensor:
        """A weight that is whole within a pass, for use after it."""
        return weight

    def passes(self) -> AbstractContextManager[object]:
        """A block with forward and backward passes."""
        return nullcontext()

    # -- gradients and the optimizer -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def pieces(self) -> Mapping[str, Piece]:
        """What this process updates, by the names of `Policy.trainable`."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors of `pieces`: the whole weights, or this process's parts of them."""
        return {name: piece.tensor for name, piece in self.pieces.items()}

    @abstractmethod
    def sum_gradients(self) -> None:
        """After the backward passes of a step: gives each of `trained` its gradient, summed over all processes."""

    def scaler(self, *, enabled: bool) -> torch.amp.GradScaler:
        """The loss scaler of float16."""
        return torch.amp.GradScaler(self.world.device.type, enabled=enabled)

    @abstractmethod
    def clip(self, limit: float) -> Tensor:
        """Scales the gradients down to a norm of at most `limit`; returns the norm before, a float64 scalar."""

    @abstractmethod
    def sum(self, own: Tensor) -> Tensor:
        """The sum over the whole model, given the sum over the pieces that count here. Collective."""

    @abstractmethod
    def norm(self, own: Tensor) -> Tensor:
        """As `sum`, for norms."""

    @abstractmethod
    def placed(self, values: Tensor, places: Tensor, size: int) -> Tensor:
        """[size] values of the whole model, given those that count here and their places. Collective."""

    # -- saving and loading --------------------------------------------------------------------------------------------

    def to_save(self, tensors: Mapping[str, Tensor], of: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors as checkpoints hold them: those shaped like this process's piece stand for the whole weight.

        of: names of tensors -> the weight that each belongs to.
        """
        return dict(tensors)

    @abstractmethod
    def own_share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes of the tensors of a checkpoint. All processes together write everything once."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], read: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Loads tensors of `to_save` in place. Collective.

        read: reads what it is given, from a checkpoint.
        """

    @abstractmethod
    def whole(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one after the other, detached, in rank 0. Collective: all processes go through all of them.

        dtype: what floating point ones are rounded to, each by the processes that hold it.
        """

    def check_folder(self, folder: Path) -> None:  # noqa: B027 (by default, only rank 0 has to see it)
        """Refuses a run folder that a process which will write in it does not see. Collective.

        Raises:
            CheckpointError: it does not.
        """

    @abstractmethod
    def describe(self) -> str | None:
        """A line of text; None where there is nothing to say."""


class Replicated(Strategy):
    """Every process holds all weights. There is no collective call in a pass, so processes may have different numbers
    of micro-batches, and repeat them when memory runs out."""

    repeats = True

    def idle(self, backward: bool, wants: Set[str] = frozenset()) -> None:
        pass

    @cached_property  # each step asks several times, and looks hundreds of weights up by their names
    def pieces(self) -> Mapping[str, Piece]:
        return {name: Piece.whole(weight) for name, weight in self.policy.trainable().items()}

    def sum_gradients(self) -> None:
        self.world.sum_gradients(self.trained.values())

    def clip(self, limit: float) -> Tensor:
        norm = gradient_norm(weight.grad for weight in self.trained.values() if weight.grad is not None)
        clip(self.trained.values(), limit, norm)
        return norm

    def sum(self, own: Tensor) -> Tensor:
        return own

    def norm(self, own: Tensor) -> Tensor:
        return own

    def placed(self, values: Tensor, places: Tensor, size: int) -> Tensor:
        return values

    def own_share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self.world.is_main else {}

    def load(self, tensors: Mapping[str, Tensor], read: Callable[[Mapping[str, Tensor]], None]) -> None:
        if self.world.is_main:  # only its machine has to see the folder
            read(tensors)
        self.world.share_tensors(tensors.values())

    def whole(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items() if self.world.is_main else ():
            yield name, rounded(tensor.detach(), dtype)

    def describe(self) -> str | None:
        return None
