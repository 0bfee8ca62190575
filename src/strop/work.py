"""The work of a micro-batch in numbers: tokens, keys that are seen, FLOP of its forward and backward pass. Floor 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strop.config import RunConfig
from strop.data.plan import RowTokens, Sized
from strop.policy.outline import Shape


@dataclass(frozen=True)
class Work:
    """A micro-batch in numbers: tokens of its rows; keys that its queries see, all together; scored tokens at most;
    tokens of its longest group; of prompts again before every further completion; squares of groups' tokens."""

    tokens: int
    seen: float
    scored: int
    longest: int
    again: int
    squares: int

    @classmethod
    def of(cls, groups: Sequence[Sized], tokens: RowTokens, *, prompts: bool = False) -> Work:
        """prompts: their own tokens are scored too."""
        own = [g.lengths for g in groups]
        spans = [tokens([g]) for g in own]
        seen = sum(g.prompt**2 / 2 + sum(g.prompt * n + n**2 / 2 for n in g.completions) for g in own)
        again = sum(g.prompt * (len(g.completions) - 1) for g in own)
        scored = sum(sum(g.completions) + (g.prompt - 1 if prompts else 0) for g in own)
        return cls(tokens(groups), seen, scored, max(spans), again, sum(span**2 for span in spans))


def flops_of(shape: Shape, work: Work, config: RunConfig) -> float:
    """Of the forward and backward pass of one micro-batch."""
    head = 2.0 * shape.vocabulary * shape.width * work.scored
    return body_flops(shape, work) * recomputing(shape, config) + head * (2 if shape.adapters else 3)


def body_flops(shape: Shape, work: Work) -> float:
    """Of all layers; attention computes its scores again on the way back."""
    products = 2.0 * shape.matrix * work.tokens * (2 if shape.adapters else 3)
    attention = 4.0 * shape.queries * shape.layers * work.seen * 3.5
    return products + attention + 6.0 * shape.adapters * work.tokens


def recomputing(shape: Shape, config: RunConfig) -> float:
    """What checkpointing makes of the layers' work."""
    return 1 + config.training.recomputed / (2 if shape.adapters else 3)
