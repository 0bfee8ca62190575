"""Seconds of every step. Floor 5.

On a CPU: what a layer of this architecture takes there, measured. On a GPU: products by its maker's rate, and passes
over memory by its bandwidth.
"""

from __future__ import annotations

import math

import numpy as np

from strop.config import RunConfig
from strop.estimate.devices import Devices, sent_bytes
from strop.estimate.flops import body_flops, flops_of, recomputing
from strop.estimate.memory import saved_per_token, trained_weights
from strop.estimate.speed import measure
from strop.machine import Machine
from strop.plan.row_tokens import RowTokens
from strop.plan.work import EpochWork, Work
from strop.policy.model.from_config import Shape
from strop.policy.precision import Precision
from strop.prepared import Prepared

PASSES = 6.0
"""How often what is saved for the backward pass moves through memory in a step: written, read, its gradient, copies.
Counted, not measured, like all that is said of a GPU's time."""
BESIDES = 1.03
"""What a step on a CPU takes, by the layers' and the head's own time: kernels for new shapes, collation, logging.
Fitted to 25 cases on two processors (benchmarks/RESULTS.md), of which it puts the median at +1 %."""

Seconds = np.ndarray


def timed_seconds(
    prepared: Prepared, shape: Shape, epoch: EpochWork, precision: Precision, tokens: RowTokens
) -> Seconds:
    """[steps] on this processor, by those of a micro-batch in layers of this architecture."""
    config, first = prepared.config, sorted(prepared.first_step(tokens), key=tokens)
    typical = first[len(first) // 2]
    speed, one = measure(config, prepared.model, precision, typical), Work.of(typical, tokens)
    entries = shape.vocabulary / speed.vocabulary
    layers = shape.layers * speed.layer * recomputing(shape, config) / body_flops(shape, one)
    head = speed.rest * entries / one.scored
    update = shape.layers * speed.layer_update + speed.rest_update * (1 if shape.adapters else entries)
    work = epoch.work
    return BESIDES * epoch.sums(layers * body_flops(shape, work) + head * work.scored) + update


def published_seconds(
    shape: Shape, epoch: EpochWork, config: RunConfig, precision: Precision, machine: Machine
) -> Seconds | None:
    """[steps] on a GPU, by its maker's figures; None where they are not known."""
    rate = machine.rate(precision.compute)
    if rate is None:
        return None
    bandwidth = machine.bandwidth or math.inf
    token = PASSES * shape.layers * saved_per_token(shape, config, precision, machine.kind) / bandwidth
    update = 4 * 7 * trained_weights(shape) / bandwidth
    return epoch.sums(flops_of(shape, epoch.work, config) / rate + token * epoch.work.tokens) + update


def together(
    seconds: Seconds,
    shape: Shape,
    epoch: EpochWork,
    precision: Precision,
    machine: Machine,
    devices: Devices,
) -> Seconds:
    """[steps] on several devices, from those that one alone would take for all of a step.

    A step's groups are dealt by their cost, so each device takes an equal part, or its longest group alone. A copy on
    each: gradients are summed after the last micro-batch. Sharded: weights come and gradients go while others compute.
    Processes on one CPU share its cores, so they take as long as one.
    """
    if machine.kind == "cpu" or devices.count == 1:
        return seconds
    work = epoch.work
    total = epoch.sums(work.tokens)
    longest = np.maximum.reduceat(work.longest, epoch.starts[:-1])
    own = np.asarray(seconds * np.maximum(1 / devices.count, longest / total))
    link = machine.link(devices.count)
    if link is None:
        return own
    micro_batches = np.ceil(np.diff(epoch.starts) / devices.count)
    exchange = sent_bytes(shape, precision, devices, micro_batches) / link
    return np.asarray(own + exchange if devices.shard == 1 else np.maximum(own, exchange))
