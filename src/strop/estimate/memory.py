"""Bytes that a run needs at its peak on each device, by what takes them. Floor 5.

In: a model's shape, the work of micro-batches, the configuration, dtypes, how the model lies on the devices. Out: bytes
by name, of the micro-batch that takes the most: weights, gradients, optimizer, what every layer keeps for its backward
pass (`saved_per_token`), and the head's tile; where weights are sharded, those that are gathered; beside them what
libraries take, and on a CPU what the process has already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from strop.allocator import KERNELS_KEPT
from strop.config import RunConfig
from strop.config.methods import MethodSettings
from strop.distributed import BUCKET_BYTES
from strop.engine.optim import state_bytes
from strop.estimate.devices import ALONE, Devices, base_bytes, gathered_bytes, scales_bytes
from strop.machine import Machine
from strop.objectives.base import Objective
from strop.plan.work import Work
from strop.policy.kernels.attention import KERNELS, best_kernel
from strop.policy.kernels.dropout import bytes_of_left_out
from strop.policy.kernels.head_sizes import head_bytes, product_dtype, tile_shape
from strop.policy.kernels.matmul import LARGE, keeps_kernels, widens
from strop.policy.kernels.tiled_attention import KEPT_BYTES
from strop.policy.model.from_config import Shape
from strop.policy.precision import Precision

MIB = 2**20
CHUNK = 4096
"""Micro-batches whose memory is computed at once: each takes some hundred bytes meanwhile."""
ROOM = 0.9
"""Share of a device's memory that a run is let plan with; the rest is for what the estimate leaves out."""
PROCESS = {"cpu": 60 * MIB, "cuda": 500 * MIB}
"""What libraries take for a run, beside tensors: thread pools; a CUDA context with its workspaces."""
HOLES = 0.4
"""What a CPU's allocator leaves unused between tensors that come and go, as a share of them: in the end, after
micro-batches of many lengths; the first eight take it half the way. Fitted to the benchmarks' cases."""
KERNEL_BYTES = 0.7 * MIB
"""Of a kernel that oneDNN keeps, with its buffers, whatever its shape; measured, as is the next."""
MKL_BYTES = 40 * MIB
"""Of MKL's buffers, where it multiplies instead."""

COPY = "copy of a checkpoint"
"""Of `training.async_save`, which lies in host memory: on a CPU it counts."""

Numbers = np.ndarray
"""[B], one for each micro-batch."""


def fits(parts: Mapping[str, int], memory: int | None) -> bool:
    """Whether a device has room for these parts, in bytes by name. memory: that of the device; None: it is not known,
    and everything fits."""
    return memory is None or sum(parts.values()) <= ROOM * memory


def peak_memory(
    work: Work,
    shape: Shape,
    config: RunConfig,
    objective: Objective[MethodSettings],
    precision: Precision,
    machine: Machine,
    devices: Devices = ALONE,
) -> dict[str, int]:
    """Bytes by name, on each device, of the micro-batch that takes the most. Not always the one with the most tokens: a
    CPU keeps probabilities of attention."""
    work = work.distinct()
    holes = HOLES * (len(work) - 1) / (len(work) + 7) if machine.kind == "cpu" else 0.0
    peak: dict[str, int] = {}
    most = -1
    for first in range(0, len(work), CHUNK):
        some = work.taken(slice(first, first + CHUNK))
        parts = memory_of(shape, some, config, precision, machine.kind, objective, holes, devices)
        totals = np.sum(list(parts.values()), axis=0)
        if (highest := int(totals.max())) > most:
            most, at = highest, int(totals.argmax())
            peak = {name: int(size[at]) for name, size in parts.items()}
    return {**peak, "process": peak["process"] + machine.held}


def memory_of(
    shape: Shape,
    work: Work,
    config: RunConfig,
    precision: Precision,
    device: str,
    objective: Objective[MethodSettings],
    holes: float,
    devices: Devices = ALONE,
) -> dict[str, np.ndarray]:
    """[B] bytes by name of each micro-batch. holes: share of what comes and goes that an allocator leaves unused."""
    c, wide = precision.compute.itemsize, precision.master.itemsize
    base, trained = shape.matrix + shape.others, trained_weights(shape)
    activations = _activations(shape, work, config, precision, device)
    head = _head(shape, work, config, precision, device, objective)
    # gradients of the widest tensors of one layer, as the backward pass goes through it
    backward = work.tokens * (4 * shape.inner * c + 4 * shape.width * _stream(shape, precision))
    casts = _casts(shape, config, precision, device) if devices.shard == 1 else 0
    scales = scales_bytes(shape)
    parts: dict[str, Numbers | float] = {
        "weights": (weight_bytes(shape, precision) - scales) / devices.shard + scales,
        "gradients": trained * wide / devices.shard,
        "optimizer": trained * state_bytes(config.training.optim, wide) / devices.shard,
        "activations": activations + _probabilities(shape, work, config, precision, device),
        "head": head + casts,
        "backward": backward,
        "allocator": holes * (activations + backward + head),
        "process": PROCESS[device],
    }
    if devices.shard > 1:
        parts["gathered weights"] = gathered = _gathered(shape, precision)
        if config.rollout.enabled or config.finetuning.sample_prompts is not None:
            in_steps = activations + head + backward + gathered
            parts["weights to sample with"] = np.maximum(0.0, _all_gathered(shape, precision) - in_steps)
    elif devices.count > 1:
        parts["sum of gradients"] = float(min(BUCKET_BYTES, trained * wide))
    if shape.matrix_bytes is not None:  # the largest one, in the compute dtype
        parts["dequantised layer"] = float(shape.width * shape.inner * c)
    if device == "cpu":
        parts["matmul library"] = _matmul_library(shape, work, config, precision)
    copies = _float32_copies(shape, work, config, precision, device)
    if copies is not None:
        parts["float32 copies"] = copies
    if device == "cpu" and config.training.async_save:
        parts[COPY] = checkpoint_bytes(shape, config, precision, objective) / devices.shard
    if config.rollout.enabled and objective.needs_reference:  # another model is taken to be as large as this one
        other = getattr(config.post_training, "ref_model_id", None) is not None
        parts["reference"] = (base * c if other else trained * wide) / devices.shard
    if shape.new_rows:  # the embedding and the head with new rows in them, and the embedding's whole gradient
        parts["new tokens"] = float(3 * shape.vocabulary * shape.width * c)
    if shape.teacher:
        parts["teacher"] = shape.teacher * c / devices.shard
    if objective.ref_sync is not None:
        parts["reference"] = base * wide + (casts if device == "cpu" else 0)
    return {name: np.broadcast_to(size, len(work)).astype(np.int64) for name, size in parts.items()}


def weight_bytes(shape: Shape, precision: Precision) -> float:
    """Of the base and its adapters, of a whole copy."""
    return base_bytes(shape, precision) + shape.adapters * precision.master.itemsize


def checkpoint_bytes(
    shape: Shape, config: RunConfig, precision: Precision, objective: Objective[MethodSettings]
) -> int:
    """Of the tensors of a checkpoint: what trains, the optimizer's state, a reference that follows the policy."""
    wide = precision.master.itemsize
    follows = wide if objective.ref_sync is not None else 0
    return trained_weights(shape) * (wide + state_bytes(config.training.optim, wide) + follows)


def trained_weights(shape: Shape) -> int:
    """How many weights are trained."""
    return shape.adapters or shape.matrix + shape.others


def _gathered(shape: Shape, precision: Precision) -> float:
    """Bytes of weights gathered in full at once on a sharded device: this layer, the next, and everything outside
    layers. If all weights train, also the gradients of one layer and of everything outside layers, in full until they
    are reduced."""
    layer, rest = gathered_bytes(shape, precision)
    gradients = 0.0 if shape.adapters else (shape.matrix / shape.layers + shape.others) * precision.master.itemsize
    return 2 * layer + rest + gradients


def _all_gathered(shape: Shape, precision: Precision) -> float:
    """Bytes of all weights, gathered in full to sample with."""
    layer, rest = gathered_bytes(shape, precision)
    return shape.layers * layer + rest + shape.adapters * precision.compute.itemsize


def saved_per_token(shape: Shape, config: RunConfig, precision: Precision, device: str) -> float:
    """Bytes that one fused layer keeps for its backward pass, per token; probabilities of attention are apart.

    c bytes per element in the compute dtype, s in the residual stream. Kept are the inputs of both norms, of linear
    layers that train (q, k and v share theirs), of the MLP with its gate and up, and queries, keys and values; of
    dropout a mask, or the places of what is left out.
    """
    c = precision.compute.itemsize
    kept: float = 2 * shape.width * _stream(shape, precision) + (shape.queries + 2 * shape.keys) * c
    if shape.adapters:
        kept += shape.adapted * bytes_of_left_out(config.lora.lora_dropout, device)
    inputs: float = shape.width + shape.queries  # flash attention keeps its output, whatever trains
    if shape.adapters and device != "cuda":
        inputs = min(shape.distinct, inputs)
    return kept + (inputs + shape.width + 2 * shape.inner) * c


def _stream(shape: Shape, precision: Precision) -> int:
    """Bytes per element of the residual stream."""
    return precision.compute.itemsize if shape.adapters else precision.master.itemsize


def _kept_layers(shape: Shape, config: RunConfig) -> tuple[int, int]:
    """Layers that keep what they need for the way back; those that have it at one time at most: of the checkpointed
    ones, one at a time is computed again."""
    share = config.training.recomputed
    if not share:
        return shape.layers, shape.layers
    kept = shape.layers - max(1, round(share * shape.layers))
    return kept, kept + 1


def _activations(shape: Shape, work: Work, config: RunConfig, precision: Precision, device: str) -> Numbers:
    """[B] of all layers, without probabilities of attention."""
    layer = saved_per_token(shape, config, precision, device) * work.tokens
    kernel = KERNELS[best_kernel(torch.device(device), precision.compute)]
    if kernel.copies_prompts and not shape.capped:
        layer = layer + 2 * shape.keys * precision.compute.itemsize * work.again
    kept, at_once = _kept_layers(shape, config)
    inputs: Numbers = (shape.layers - kept) * work.tokens * shape.width * _stream(shape, precision)
    return np.asarray(at_once * layer + inputs)


def _probabilities(shape: Shape, work: Work, config: RunConfig, precision: Precision, device: str) -> Numbers | float:
    """[B] of attention, of all layers that keep them."""
    _, at_once = _kept_layers(shape, config)
    if shape.capped:  # whole squares: the tangent, the softmax in float32, and that in 16 bits
        return np.asarray(at_once * (shape.heads * work.squares * 8.0))
    if device != "cpu":
        return 0.0
    kept = np.minimum(shape.heads * work.seen * precision.compute.itemsize, KEPT_BYTES * work.tokens)
    return np.asarray(at_once * kept)


def _product(config: RunConfig, precision: Precision, device: str) -> torch.dtype:
    """What the head multiplies in."""
    return product_dtype(precision.of_head(config.training.fp32_logits), device)


def _casts(shape: Shape, config: RunConfig, precision: Precision, device: str) -> int:
    """Copies of weights that train, in the compute dtype."""
    if not precision.is_low or shape.adapters:
        return 0
    embedding = shape.vocabulary * shape.width if _product(config, precision, device) == precision.compute else 0
    return (shape.matrix + embedding) * precision.compute.itemsize


def _head(
    shape: Shape,
    work: Work,
    config: RunConfig,
    precision: Precision,
    device: str,
    objective: Objective[MethodSettings],
) -> Numbers:
    """[B] of the head with its inputs, and of the gradient of its weight."""
    product, wide = _product(config, precision, device), precision.master.itemsize
    trains = not shape.adapters or shape.new_rows > 0
    counts, number = np.unique(work.scored, return_inverse=True)
    each = [
        head_bytes(
            scored,
            shape.vocabulary,
            shape.width,
            device,
            product,
            transform=shape.transform,
            collisions="collisions" in objective.reads,
            trains=trains,
            entropies="entropies" in objective.reads,
        )
        for scored in counts.tolist()
    ]
    gradient = shape.vocabulary * shape.width * wide if trains else 0
    return np.asarray(np.array(each, np.float64)[number] + work.tokens * shape.width * wide + gradient)


def _is_narrow(precision: Precision, device: str) -> bool:
    """Whether products are made in 16 bits."""
    return precision.is_low and not (device == "cpu" and widens(precision.compute))


def _matmul_library(shape: Shape, work: Work, config: RunConfig, precision: Precision) -> Numbers:
    """[B] of the library that multiplies on a CPU: in float32 oneDNN has the large products alone."""
    product = _product(config, precision, "cpu")
    counts, number = np.unique(work.scored, return_inverse=True)
    tiles = [math.prod(tile_shape(scored, shape.vocabulary, "cpu", product)) for scored in counts.tolist()]
    largest = shape.width * np.maximum(work.tokens * shape.inner, np.array(tiles)[number])
    by_onednn = keeps_kernels(precision.compute) & (_is_narrow(precision, "cpu") | (largest >= LARGE))
    return np.where(by_onednn, KERNELS_KEPT * KERNEL_BYTES, float(MKL_BYTES))


def _float32_copies(
    shape: Shape, work: Work, config: RunConfig, precision: Precision, device: str
) -> Numbers | float | None:
    """[B] in float32: a frozen head; of one layer at a time its weight, what it reads, and results with their
    gradients. None where there are none."""
    frozen = shape.adapters and _product(config, precision, device) != precision.compute
    copies: Numbers | float = float(shape.vocabulary * shape.width) if frozen else 0.0
    if precision.is_low and not _is_narrow(precision, device):
        return 4 * (copies + shape.width * shape.inner + work.tokens * (2 * shape.inner + shape.width))
    return 4 * copies if frozen else None
