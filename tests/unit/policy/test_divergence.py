"""The divergence of two heads, tile by tile, is that of whole logits: its value, its gradients, and TRL's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from divergences import naive_divergences
from strop.policy.kernels import head_sizes
from strop.policy.kernels.divergence import Head, divergences
from strop.policy.model.logit_transform import LogitTransform

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TRANSFORMS = (LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 3.0))
M, V, D, E = 11, 53, 7, 5


def heads(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    student = [made(M, D), made(V, D), made(V)]
    return student, [made(M, E), made(V, E), made(V)], torch.randint(V, (M,), generator=draw)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_sizes.SMALL_TILES, "cpu", (4, 10))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_those_of_whole_logits(
    beta: float, transform: LogitTransform, temperature: float
) -> None:
    student, teacher, targets = heads()
    weights = torch.linspace(-1, 1, M, dtype=torch.float64)
    found = []
    for tiled in (True, False):
        own = [x.clone().requires_grad_() for x in student]
        if tiled:
            at = transform.at_temperature(temperature)
            compared = divergences(Head(*own, at), Head(*teacher, at), targets, beta=beta, temperature=temperature)
            value, logps = compared
        else:
            y, t = (transform(h @ w.t() + b) for h, w, b in (own, teacher))
            value = naive_divergences(y / temperature, t / temperature, beta)
            logps = y.detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (value * weights).sum().backward()
        found.append([value.detach(), logps, *(x.grad for x in own)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert not found[0][1].requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_is_that_of_trl(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is the oracle; install the extra `dev`")
    student, teacher, targets = heads()
    y, t = (h @ w.t() + b for h, w, b in (student, teacher))
    plain = LogitTransform()
    for temperature in (1.0, 0.9):
        theirs = gkd.GKDTrainer.generalized_jsd_loss(
            y[None], t[None], labels=targets[None], beta=beta, temperature=temperature
        )
        at = plain.at_temperature(temperature)
        ours = divergences(Head(*student, at), Head(*teacher, at), targets, beta=beta, temperature=temperature)
        torch.testing.assert_close(ours.divergence.mean(), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence_and_no_slope(beta: float) -> None:
    student, _, targets = heads()
    own = [x.clone().requires_grad_() for x in student]
    found = divergences(Head(*own, TRANSFORMS[0]), Head(*student, TRANSFORMS[0]), targets, beta=beta).divergence
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-12
    assert all(x.grad is not None and float(x.grad.abs().max()) < 1e-10 for x in own)


def test_float32_is_near_float64_where_logits_are_large() -> None:
    student, teacher, targets = heads()
    student, teacher = ([x[0] * 8, x[1], x[2]] for x in (student, teacher))
    exact = divergences(Head(*student, TRANSFORMS[0]), Head(*teacher, TRANSFORMS[0]), targets, beta=0.5).divergence
    low = [[x.float() for x in side] for side in (student, teacher)]
    found = divergences(Head(*low[0], TRANSFORMS[0]), Head(*low[1], TRANSFORMS[0]), targets, beta=0.5).divergence
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_unlike_vocabularies_are_refused() -> None:
    student, teacher, targets = heads()
    with pytest.raises(ValueError, match="53 and 52"):
        short = Head(teacher[0], teacher[1][:-1], None, TRANSFORMS[0])
        divergences(Head(*student, TRANSFORMS[0]), short, targets, beta=0.5)
