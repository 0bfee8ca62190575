"""Numbers too small for their format, taken for 0. Floor 2.

float32 holds numbers below 1.2e-38 with fewer digits and fewer ("denormal"), which processors compute many times slower
than others. The softmax of a model that is sure of its tokens is full of them. They are far below what log-probs and
gradients are rounded to.
"""

from __future__ import annotations

import ctypes
import logging
import os

import torch

logger = logging.getLogger("strop")


def flush_denormals() -> None:
    """Let this process take denormal numbers for 0, from now on, where the processor can.

    Each thread has a switch of its own. Threads take it over from the one that starts them, so this is called before
    the first work that needs several; those of OpenMP that run already (a caller may have used torch before) are
    switched one by one.
    """
    if not torch.set_flush_denormal(True):
        logger.debug("this processor cannot flush denormal numbers")
        return
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if parallel is None:  # another OpenMP than GNU's, or none
        logger.debug("threads of OpenMP that run already keep their denormal numbers")
        return

    def switch(_: object) -> None:
        torch.set_flush_denormal(True)

    in_each = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(switch)
    parallel(in_each, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))
