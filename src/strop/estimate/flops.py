"""Floating-point operations of micro-batches, forward and backward, one number each. Floor 5."""

from __future__ import annotations

import numpy as np

from strop.config import RunConfig
from strop.plan.dealing import GroupCost
from strop.plan.work import Work
from strop.policy.model.from_config import Shape

Floats = np.ndarray


def flops_of(shape: Shape, work: Work, config: RunConfig) -> Floats:
    """[B] of the forward and backward pass of each micro-batch."""
    head = 2.0 * shape.vocabulary * shape.width * work.scored
    return body_flops(shape, work) * recomputing(shape, config) + head * (2 if shape.adapters else 3)


def body_flops(shape: Shape, work: Work) -> Floats:
    """[B] of all layers; attention computes its scores again on the way back."""
    products = 2.0 * shape.matrix * work.tokens * (2 if shape.adapters else 3)
    attention = 4.0 * shape.queries * shape.layers * work.seen * 3.5
    return products + attention + 6.0 * shape.adapters * work.tokens


def recomputing(shape: Shape, config: RunConfig) -> float:
    """What checkpointing makes of the layers' work."""
    return 1 + config.training.recomputed / (2 if shape.adapters else 3)


def group_cost(shape: Shape, config: RunConfig) -> GroupCost:
    """What attention and the head cost beside one token's way through the layers, forward and backward."""
    ways = 2 if shape.adapters else 3
    token = (2.0 * shape.matrix * ways + 6.0 * shape.adapters) * recomputing(shape, config)
    seen = 4.0 * shape.queries * shape.layers * 3.5 * recomputing(shape, config)
    return GroupCost(seen / token, 2.0 * shape.vocabulary * shape.width * ways / token)
