"""The divergence of two models as its formula says it, of whole logits: the oracle of the tiled one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def naive_divergences(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """[M] in nats, of logits [M, V], through autograd (arXiv 2306.13649, eq. 3)."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    of_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1)
