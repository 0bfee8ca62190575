"""How the head is cut into tiles, and what memory it takes: numbers alone, for the head and for the estimate. Floor 2.

Shapes: M scored tokens, D width, V vocabulary; R rows and C columns of one tile.
"""

from __future__ import annotations

import math

import torch

from strop.policy.kernels.matmul import widens
from strop.policy.model.logit_transform import LogitTransform

CPU_ROWS, ROW_BYTES = 2048, 2**13
"""On a CPU: R, and the bytes of one row of a tile. Products are then as large as those of the layers, and need no more
memory than these. MKL copies W for every product, so products of few rows with all of W take 1.3 times as long."""
GPU_ROWS, TILE_ELEMENTS = 256, 2**26
"""R at least and R x C on other devices, where a tile has all columns: 128 MiB of 16-bit logits, and twice 256 MiB of
float32 beside them. As many elements of W's gradient are computed at once."""
SLAB_ELEMENTS = 2**20
"""Logits that go through the softmax at once on a CPU: 4 MiB of float32."""

SMALL_TILES = {"cpu": (512, 2048), "cuda": (2048, 8192)}
"""Rows and columns of a tile, at most, where some six tiles are in memory at a time: divergences and entropies."""

KEPT_GRADIENTS = 2
"""Memory for the logits of a head that trains, as a multiple of that of W's gradient. It is half of what W, its
gradient and the optimizer's state take. Training all of a model of 135 million weights takes 5 % less time with it."""


def product_dtype(compute: torch.dtype, device_type: str) -> torch.dtype:
    """What the head multiplies in where a model computes in `compute`: float32 on a processor whose products of 16 bits
    are widened, and which would widen W again and again."""
    return torch.float32 if device_type == "cpu" and widens(compute) else compute


def sum_dtype(compute: torch.dtype) -> torch.dtype:
    """Of softmax and sums over tiles."""
    return torch.promote_types(compute, torch.float32)


def tile_shape(num_rows: int, vocabulary: int, device_type: str, compute: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the largest tile of this many scored tokens."""
    if device_type == "cpu":
        return min(num_rows, CPU_ROWS), min(vocabulary, ROW_BYTES // compute.itemsize)
    return min(num_rows, max(GPU_ROWS, TILE_ELEMENTS // vocabulary)), vocabulary


def small_tile(device_type: str) -> tuple[int, int]:
    """Rows and columns of the largest tile of divergences and entropies."""
    return SMALL_TILES["cuda" if device_type == "cuda" else "cpu"]


def parts(size: int, most: int) -> list[slice]:
    """As few parts as can be, about equal: a small one takes as much reading of W as a large one."""
    num_parts = -(-size // most)
    step = min(most, -(-size // (16 * num_parts)) * 16)  # whole vectors
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def gradient_columns(width: int) -> int:
    """Columns whose part of W's gradient is computed at once, at most."""
    return max(1, TILE_ELEMENTS // width)


def kept_logits(num_rows: int, vocabulary: int, width: int, compute: torch.dtype) -> int:
    """Logits that are kept at most where the head trains."""
    rows = KEPT_GRADIENTS * width * sum_dtype(compute).itemsize // compute.itemsize
    return min(num_rows, rows) * vocabulary


def head_bytes(
    num_rows: int,
    vocabulary: int,
    width: int,
    device_type: str,
    compute: torch.dtype,
    *,
    transform: LogitTransform,
    collisions: bool,
    trains: bool,
    entropies: bool = False,
) -> int:
    """What the head takes beside W and its gradient: for every scored token its state and gradients, [M, D] each; what
    tiles share, which is their logits and what the softmax takes; where the head trains, the logits that are kept and a
    part of W's gradient. entropies: what these take, too, of which W has another gradient."""
    tile = tile_shape(num_rows, vocabulary, device_type, compute)
    stats = sum_dtype(compute)
    temporary = collisions or transform.softcap is not None
    slabs = 1 + (compute != stats or transform.changes) + temporary
    logits = tile[0] * tile[1]
    if trains:
        logits += min(tile[1], gradient_columns(width)) * width + kept_logits(num_rows, vocabulary, width, compute)
    wide = 5 * num_rows * width + slabs * slab_elements(tile, device_type)
    if entropies:
        wide += 6 * math.prod(small_tile(device_type)) + num_rows * width + trains * vocabulary * width
    return logits * compute.itemsize + wide * stats.itemsize


def slab_elements(tile: tuple[int, int], device_type: str) -> int:
    """Of as many rows of a tile as go through the softmax at once, one at least."""
    return min(max(SLAB_ELEMENTS, tile[1]), tile[0] * tile[1]) if device_type == "cpu" else tile[0] * tile[1]
