"""How running out of memory is recognised and survived. Floor 2.

Work that ran out of memory is tried again only after its exception is gone, because a traceback keeps the tensors of
every frame that it went through.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from strop.types import Group

T = TypeVar("T")

_SIGNS = re.compile(
    "DefaultCPUAllocator: can't allocate memory|not enough memory: you tried to allocate|Cannot allocate memory|"
    "CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc|"
    "could not create a (primitive|memory object)(?! desc)"  # oneDNN, which says no more
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


def attempt(compute: Callable[[], T]) -> tuple[T | None, str]:
    """Returns (result, ""), or (None, why) if memory ran out; then everything that was allocated is free again."""
    try:
        return compute(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = str(error).partition("\n")[0] or "memory ran out"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, why


def in_halves(score: Callable[[Sequence[Group]], Tensor], groups: Sequence[Group]) -> Tensor:
    """Scores all groups at once or, if memory does not suffice, their halves one after the other.

    For passes without gradients, in which groups do not influence each other: the result is [M] in the same order, and
    the same up to rounding.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: one group alone does not fit.
    """
    if len(groups) == 1:
        return score(groups)
    whole, _ = attempt(lambda: score(groups))
    if whole is not None:
        return whole
    middle = len(groups) // 2
    return torch.cat([in_halves(score, groups[:middle]), in_halves(score, groups[middle:])])
