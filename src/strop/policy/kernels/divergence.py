"""How far two models' distributions of the next token are apart, through both heads, tile by tile. Floor 2.

Shapes: M scored tokens, V vocabulary, D width of the student, E width of the teacher; R rows and C columns of a tile.

With s and t the softmax of the student's and the teacher's logits, m = beta t + (1 - beta) s, per token

    beta 0          KL(t || s)
    beta 1          KL(s || t)
    between         beta KL(t || m) + (1 - beta) KL(s || m)

which is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 3). With y the student's logits, the
slopes are s - t under beta 0, s (log(s / t) - KL(s || t)) under beta 1, else (1 - beta) s (log(s / m) - KL(s || m)).

The logits are made tile by tile, never [M, V] at once, and made again wherever they are needed again: once for the sums
of the two softmaxes, once for the divergence, and once in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from strop.policy.kernels.head_sizes import parts, product_dtype, small_tile, sum_dtype
from strop.policy.model.logit_transform import LogitTransform


class Head(NamedTuple):
    """A head and what comes before it. hidden: [M, D]. weight: [V, D]. bias: [V] or None. transform: of its logits, at
    the temperature at which distributions are compared."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform


class Compared(NamedTuple):
    """[M] each: the divergence, with gradients to the student's head; and the log-probs of the targets under the
    student at temperature 1, without."""

    divergence: Tensor
    logps: Tensor


def divergences(
    student: Head,
    teacher: Head,
    targets: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    compute: torch.dtype | None = None,
) -> Compared:
    """The divergence at each token, in nats; in float32, or float64 where `compute` is.

    Args:
        targets: [M] the tokens that came.
        beta: in [0, 1].
        temperature: at which `student.transform` is.
        compute: dtype of the matrix products; None: that of the student's hidden states.

    Raises:
        ValueError: the heads have vocabularies of different sizes.
    """
    if student.weight.shape[0] != teacher.weight.shape[0]:
        sizes = f"{student.weight.shape[0]} and {teacher.weight.shape[0]}"
        raise ValueError(f"vocabularies of {sizes} tokens cannot be compared")
    compute = product_dtype(compute or student.hidden.dtype, student.hidden.device.type)
    how = _How(beta, temperature, compute, student.transform, _detached(teacher), targets)
    with torch.autocast(student.hidden.device.type, enabled=False):
        found = _Divergences.apply(student.hidden, student.weight, student.bias, how)  # type: ignore[no-untyped-call]
        return Compared(*found)


def _detached(head: Head) -> Head:
    return head._replace(hidden=head.hidden.detach(), weight=head.weight.detach())


@dataclass(frozen=True, slots=True)
class _How:
    beta: float
    temperature: float
    compute: torch.dtype
    transform: LogitTransform
    teacher: Head
    targets: Tensor

    @property
    def stats(self) -> torch.dtype:
        return sum_dtype(self.compute)

    def logits(self, head: Head, rows: slice, columns: slice) -> Tensor:
        """y [R, C]."""
        hidden, weight = head.hidden[rows].to(self.compute), head.weight[columns].to(self.compute)
        z = F.linear(hidden, weight).to(self.stats)
        return head.transform(z if head.bias is None else z + head.bias[columns].to(self.stats))


def _added(total: Tensor, y: Tensor) -> Tensor:
    """log(exp(total) + the sum of exp(y)), [R, 1]."""
    return torch.logaddexp(total, y.logsumexp(-1, keepdim=True))


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> tuple[Tensor, Tensor]:
        student = Head(hidden, weight, bias, how.transform)
        num_rows, tile = len(hidden), small_tile(hidden.device.type)
        divergence, logps, of_student, sums_s, sums_t = (
            torch.zeros(num_rows, 1, dtype=how.stats, device=hidden.device) for _ in range(5)
        )
        for rows in parts(num_rows, tile[0]):
            sums = _sums(student, how, rows, tile[1])
            sums_s[rows], sums_t[rows], logps[rows] = sums
            for columns in parts(len(weight), tile[1]):
                log_s = how.logits(student, rows, columns) - sums_s[rows]
                log_t = how.logits(how.teacher, rows, columns) - sums_t[rows]
                whole, own = _parts(log_s, log_t, how.beta)
                divergence[rows] += whole
                of_student[rows] += own
        ctx.how, ctx.tile = how, tile
        ctx.save_for_backward(hidden, weight, bias, sums_s, sums_t, of_student)
        logps = logps[:, 0]
        ctx.mark_non_differentiable(logps)
        return divergence[:, 0], logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, sums_s, sums_t, of_student = ctx.saved_tensors
        how, tile, student = ctx.how, ctx.tile, Head(hidden, weight, bias, ctx.how.transform)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros(hidden.shape, dtype=how.stats, device=hidden.device) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=how.stats, device=hidden.device) if wants_weight else None
        d_bias = torch.zeros(weight.shape[:1], dtype=how.stats, device=hidden.device) if wants_bias else None
        for rows in parts(len(hidden), tile[0]):
            for columns in parts(len(weight), tile[1]):
                y = how.logits(student, rows, columns)
                log_t = how.logits(how.teacher, rows, columns) - sums_t[rows]
                slopes = _slopes(y - sums_s[rows], log_t, of_student[rows], how.beta)
                slopes = slopes * how.transform.slope(y) * grad[rows, None]
                low = slopes.to(how.compute)
                if d_hidden is not None:
                    d_hidden[rows] += (low @ weight[columns].to(how.compute)).to(how.stats)
                if d_weight is not None:
                    d_weight[columns] += (low.t() @ hidden[rows].to(how.compute)).to(how.stats)
                if d_bias is not None:
                    d_bias[columns] += slopes.sum(0)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
        )


def _sums(student: Head, how: _How, rows: slice, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """[R, 1] each: log of the sum of exp(y) of student and teacher; the log-probs of the targets at temperature 1."""
    targets = how.targets[rows, None]
    nothing = student.hidden.new_full((len(targets), 1), -torch.inf, dtype=how.stats)
    sum_s, sum_t, untempered, at_target = nothing, nothing, nothing, torch.zeros_like(nothing)
    for columns in parts(len(student.weight), most):
        y = how.logits(student, rows, columns)
        sum_s, sum_t = _added(sum_s, y), _added(sum_t, how.logits(how.teacher, rows, columns))
        plain = y if how.temperature == 1.0 else y * how.temperature
        untempered = sum_s if how.temperature == 1.0 else _added(untempered, plain)
        here = (targets >= columns.start) & (targets < columns.stop)
        found = plain.gather(1, (targets - columns.start).clamp(0, columns.stop - columns.start - 1))
        at_target = torch.where(here, found, at_target)
    return sum_s, sum_t, at_target - untempered


def _mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))


def _parts(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """[R, 1] each: a tile's share of the divergence, and of the student's own part of it, which the slopes need."""
    if beta == 0:
        whole = (log_t.exp() * (log_t - log_s)).sum(-1, keepdim=True)
        return whole, torch.zeros_like(whole)
    if beta == 1:
        whole = (log_s.exp() * (log_s - log_t)).sum(-1, keepdim=True)
        return whole, whole
    log_m = _mixture(log_s, log_t, beta)
    own = (log_s.exp() * (log_s - log_m)).sum(-1, keepdim=True)
    of_teacher = (log_t.exp() * (log_t - log_m)).sum(-1, keepdim=True)
    return beta * of_teacher + (1 - beta) * own, own


def _slopes(log_s: Tensor, log_t: Tensor, own: Tensor, beta: float) -> Tensor:
    """d divergence / d y [R, C]."""
    if beta == 0:
        return log_s.exp() - log_t.exp()
    other = log_t if beta == 1 else _mixture(log_s, log_t, beta)
    return (1.0 if beta == 1 else 1 - beta) * log_s.exp() * (log_s - other - own)
