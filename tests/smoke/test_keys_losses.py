"""Keys of post_training that belong to one method or one loss: each does what it says, in a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

LN2 = math.log(2)


def first(run: Any, name: str = "loss") -> float:
    """The metric in the evaluation before the first step."""
    value: float = run.series(name, "eval")[0]
    return value


def slope(run: Any) -> float:
    """The norm of the first gradient: |d loss / d margin| times the same, where the loss is one of the margin."""
    value: float = run.series("grad_norm")[0]
    return value


@pytest.mark.nightly
def test_post_training__bco_delta(runs: Any) -> None:
    mean, zero = (runs(loss_type="bco_pair", bco_delta=delta) for delta in ("mean", "zero"))
    assert first(mean) == first(zero) == pytest.approx(2 * LN2)
    assert mean.series("loss")[0] == zero.series("loss")[0] and mean.series("loss")[-1] != zero.series("loss")[-1]


@pytest.mark.nightly
def test_post_training__discopop_tau(runs: Any) -> None:
    for tau in (0.05, 0.5):
        # at z = 0: -ls(z) (1 - m) + exp(-z) m with m' = 1 / (4 tau)
        expected = abs((1 - LN2) / (4 * tau) - 0.75) / 0.5
        ratio = slope(runs(loss_type="discopop", discopop_tau=tau)) / slope(runs())
        assert ratio == pytest.approx(expected, rel=1e-4)


@pytest.mark.nightly
def test_post_training__f_divergence(runs: Any) -> None:
    plain, js, forward = runs(), runs(f_divergence="js"), runs(f_divergence="forward_kl")
    assert first(js) == first(forward) == pytest.approx(LN2)
    # d f'(t) / d log t at t = 1
    assert slope(js) == pytest.approx(slope(plain) / 2, rel=1e-5)
    assert slope(forward) == pytest.approx(slope(plain), rel=1e-5)
    assert forward.series("loss")[-1] != pytest.approx(plain.series("loss")[-1], rel=1e-6)


@pytest.mark.nightly
def test_post_training__f_alpha(runs: Any) -> None:
    for alpha, same in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        assert runs(f_divergence="alpha", f_alpha=alpha).untimed == runs(f_divergence=same).untimed
    assert runs(f_divergence="alpha", f_alpha=0.3).untimed != runs().untimed


@pytest.mark.nightly
def test_post_training__ld_alpha(runs: Any) -> None:
    plain, cut = runs(), runs(ld_alpha=0.0)
    assert runs(ld_alpha=1.0).untimed == plain.untimed
    assert first(cut) == pytest.approx(LN2) and slope(cut) != pytest.approx(slope(plain), rel=1e-3)


def test_post_training__sft_weight(runs: Any) -> None:
    run = runs(sft_weight=0.4)
    assert first(run) == pytest.approx(LN2 - 0.4 * first(run, "logps_per_token/chosen"))
    assert first(run, "loss/preference") == pytest.approx(LN2)


def test_post_training__wpo_weighting(runs: Any) -> None:
    plain, weighted = runs(), runs(wpo_weighting=True)
    # the tiny model is unsure of every token, so its weights are small
    assert 0 < first(weighted) < 0.9 * first(plain)


def test_post_training__ref_sync_steps(runs: Any) -> None:
    run = runs(ref_sync_steps=1, ref_mixup_alpha=1.0)
    evaluations = [r for r in run.metrics if r["split"] == "eval"]
    assert len(evaluations) > 1
    assert all(r["rewards/margins"] == 0 for r in evaluations)


@pytest.mark.nightly
def test_post_training__ref_mixup_alpha(runs: Any) -> None:
    last = [runs(ref_sync_steps=1, ref_mixup_alpha=alpha).metrics[-1] for alpha in (0.01, 0.6, 1.0)]
    away = [abs(r["rewards/margins"]) for r in last]
    assert away[0] > away[1] > away[2] == 0


def test_post_training__orpo_nll(runs: Any) -> None:
    completion, full = (runs(method="orpo", orpo_nll=nll) for nll in ("completion", "full"))
    assert first(completion, "loss/preference") == pytest.approx(first(full, "loss/preference"))
    assert first(completion, "loss/nll") == pytest.approx(-first(completion, "logps_per_token/chosen"))
    assert first(full, "loss/nll") != pytest.approx(first(completion, "loss/nll"), rel=1e-3)


@pytest.mark.nightly
def test_post_training__simpo_beta(runs: Any) -> None:
    one, two = (runs(method="simpo", simpo_beta=beta) for beta in (1.0, 3.0))
    assert first(two, "rewards/margins") == pytest.approx(3 * first(one, "rewards/margins"))


def test_post_training__simpo_gamma(runs: Any) -> None:
    run = runs(method="simpo", simpo_beta=2.0, simpo_gamma=1000.0)  # so far that the loss is linear
    assert first(run) == pytest.approx(2000 - first(run, "rewards/margins"))


def test_post_training__cpo_alpha(runs: Any) -> None:
    none, some = (runs(method="cpo", cpo_alpha=alpha) for alpha in (0.0, 0.7))
    assert first(some) - first(none) == pytest.approx(-0.7 * first(some, "logps_per_token/chosen"))
    assert "loss/nll" in some.metrics[0] and "loss/nll" not in none.metrics[0]


@pytest.mark.nightly
def test_post_training__kto_loss(runs: Any) -> None:
    kto, apo = (runs(method="kto", kto_loss=loss) for loss in ("kto", "apo_zero_unpaired"))
    assert first(kto) == first(apo) == 0.5
    assert first(kto, "kl") == 0 and "kl" not in apo.metrics[0]


def test_post_training__desirable_weight(runs: Any) -> None:
    assert first(runs(method="kto", desirable_weight=3.0)) == 0.5 * (3 + 1) / 2  # half of the rows are desirable


def test_post_training__undesirable_weight(runs: Any) -> None:
    assert first(runs(method="kto", undesirable_weight=2.0)) == 0.5 * (1 + 2) / 2
