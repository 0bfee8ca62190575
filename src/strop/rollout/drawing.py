"""Logits to tokens: which tokens are drawn from, and the draw. Floor 4.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Drawing:
    """Which tokens may be drawn. Each limit takes some of those that the one before it has left: the first `vocabulary`
    ones (None: all), since a model may have logits for more than its tokenizer knows; the top_k likeliest (0: all); the
    likeliest that together have the probability top_p; those at least min_p times as likely as the likeliest. Logits
    are multiplied by `factor` first."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    vocabulary: int | None = None
    factor: float = 1.0

    def restricted(self, probs: Tensor) -> Tensor:
        """[R, V] probabilities -> [R, at most `vocabulary`] those of tokens that may be drawn, else 0. They are not
        scaled to sum to 1 again."""
        probs = probs[:, : self.vocabulary]
        if 0 < self.top_k < probs.shape[-1]:
            probs = probs.where(probs >= probs.topk(self.top_k, dim=-1).values[:, -1:], 0.0)
        if self.top_p < 1:
            ordered, places = probs.sort(dim=-1, descending=True, stable=True)
            total = ordered.sum(-1, keepdim=True)
            before = ordered.cumsum(-1) - ordered
            kept = before < self.top_p * total  # the likeliest one always
            probs = torch.zeros_like(probs).scatter(-1, places, ordered.where(kept, 0.0))
        if self.min_p > 0:
            probs = probs.where(probs >= self.min_p * probs.max(-1, keepdim=True).values, 0.0)
        return probs

    def draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token per row, by the inverse of the distribution function.

        Args:
            logits: [R, V]. uniforms: [R] float64 in [0, 1).

        Returns:
            [R] tokens, [R] their natural log-probs under all of the vocabulary, and [R] its entropy in nats.
        """
        logps = (logits if self.factor == 1.0 else logits * self.factor).log_softmax(-1)
        probs = logps.double().exp()
        reached = self.restricted(probs).cumsum(-1)
        total = reached[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))
        at = torch.minimum(uniforms[:, None] * total, below)
        # where logits are not finite, none is found: the last one, whose log-prob is not finite, either, stands for it
        tokens = torch.searchsorted(reached, at, right=True).clamp(max=reached.shape[-1] - 1)
        finite = logps.clamp(min=torch.finfo(logps.dtype).min)  # 0 x log 0 is 0
        return tokens.squeeze(1), logps.gather(1, tokens).squeeze(1), -(probs * finite).sum(-1)


FROM_ALL = Drawing()


def uniforms(seed: int, step: int, prompt: int, index: int, count: int) -> NDArray[np.float64]:
    """The random numbers of one completion, in [0, 1): one per token, a function of these numbers alone."""
    return np.random.default_rng([seed, 0x726F6C6C, step, prompt, index]).random(count)
