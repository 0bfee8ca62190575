"""What every loss must be where the answer is known without a peer (policy = reference, swapped sides, scaling)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scored import make_scores, ref_columns
from strop.batch import Scores
from strop.columns import NO_COLUMNS, Columns
from strop.config.methods import (
    CpoSettings,
    DpoSettings,
    IpoSettings,
    KtoSettings,
    MethodSettings,
    OrpoSettings,
    SftSettings,
    SimpoSettings,
)
from strop.engine.step import step_loss
from strop.errors import ConfigError
from strop.objectives.base import build_objective
from strop.objectives.dpo import Dpo
from strop.objectives.ipo import Ipo
from strop.objectives.orpo import odds_ratio_loss
from strop.objectives.pairs import PairObjective
from strop.objectives.sft import Sft
from variants import SETTINGS, dpo, name

PAIRS = 3
LN2 = math.log(2)
PAIR_SETTINGS = [s for s in SETTINGS if build_objective(s).rows == "pair"]


def pairs(chosen: Tensor, rejected: Tensor, ref: Tensor | None = None, tokens: int = 1) -> Scores:
    """Scores of pairs whose completions have `tokens` tokens of equal log-prob and these sums, after prompts of two
    tokens, one of them scored; drawn from, the policy would always write the same token."""
    logps = torch.stack([chosen, rejected], 1).flatten().double()
    n = len(logps)
    ref_logps = (torch.zeros(n) if ref is None else ref / tokens).double().repeat_interleave(tokens)
    columns = Columns(
        per_token={"ref_logps": ref_logps, "collisions": torch.zeros(n * tokens).double()},
        per_prompt_token={"prompt_logps": torch.full((n // 2,), -2.0).double()},
    )
    per_token = (logps / tokens).repeat_interleave(tokens)
    return make_scores(per_token, [tokens] * n, [2] * (n // 2), columns, prompt_lengths=[2] * (n // 2))


def loss(settings: MethodSettings, scores: Scores) -> float:
    return loss_and_gradient(settings, scores)[0]


def loss_and_gradient(settings: MethodSettings, scores: Scores) -> tuple[float, Tensor]:
    objective = build_objective(settings)
    leaf = scores.logps.clone().requires_grad_()
    counts = {term: unit(scores.structure) for term, unit in objective.units.items()}
    value = step_loss(objective, replace(scores, logps=leaf), counts)
    return float(value.detach()), torch.autograd.grad(value, leaf)[0]


# -- policy = reference


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dpo(), lambda b: LN2),
        (dpo(label_smoothing=0.3), lambda b: LN2),
        *((dpo(f_divergence=f), lambda b: LN2) for f in ("forward_kl", "js", "alpha")),
        (dpo(ld_alpha=0.5), lambda b: LN2),
        *((dpo(loss_type), lambda b: LN2) for loss_type in ("sigmoid_norm", "aot", "aot_unpaired", "robust")),
        (dpo("robust", label_smoothing=0.3), lambda b: LN2),
        *((dpo(loss_type), lambda b: 1.0) for loss_type in ("hinge", "kto_pair", "apo_zero", "apo_down")),
        (dpo("ipo"), lambda b: (1 / (2 * b)) ** 2),
        (dpo("ipo", ipo_norm="sum"), lambda b: (1 / (2 * b)) ** 2),
        (IpoSettings(), lambda b: (1 / (2 * b)) ** 2),
        *((dpo(loss_type), lambda b: 2 * LN2) for loss_type in ("nca_pair", "bco_pair")),
        (dpo("sppo_hard"), lambda b: 0.5 / b**2),
        (dpo("discopop"), lambda b: (LN2 + 1) / 2),
        (dpo("exo_pair"), lambda b: -LN2 - math.log(1e-3 * (1 - 1e-3)) / 2),
    ],
    ids=lambda x: name(x) if isinstance(x, MethodSettings) else "",
)
def test_policy_equal_to_reference(settings, expected, beta: float) -> None:  # type: ignore[no-untyped-def]
    logps = -torch.rand(2 * PAIRS) * 50
    scores = pairs(logps[0::2], logps[1::2], ref=logps)
    objective = build_objective(settings.model_copy(update={"beta": beta}))
    assert loss(objective.settings, scores) == pytest.approx(expected(beta), rel=1e-12)
    metrics = {k: float(total) / n for k, (total, n) in objective.metrics(scores).items()}
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0, "ties are not correct"
    margins = objective.margins(scores)
    assert margins is not None and margins.tolist() == [0.0] * PAIRS


def test_a_likelihood_term_is_added_by_its_own_count() -> None:
    scores = pairs(torch.tensor([-6.0, -3.0]), torch.tensor([-6.0, -3.0]), torch.tensor([-6.0, -6, -3, -3]), tokens=3)
    assert loss(dpo(sft_weight=0.5), scores) == pytest.approx(LN2 + 0.5 * 9 / 6)
    assert set(Dpo(dpo(sft_weight=0.5)).units) == {"preference", "nll"}
    assert set(Dpo(dpo()).units) == {"preference"}


def test_reference_free_losses_at_equal_sides() -> None:
    sides = torch.tensor([-6.0, -3.0])
    scores = replace(pairs(sides, sides, tokens=3), columns=NO_COLUMNS)
    nll = 9 / 6
    assert loss(SimpoSettings(simpo_beta=2.0, simpo_gamma=0.8), scores) == pytest.approx(math.log1p(math.exp(1.6)))
    assert loss(OrpoSettings(beta=0.1), scores) == pytest.approx(nll + 0.1 * LN2)
    assert loss(CpoSettings(cpo_alpha=0.5), scores) == pytest.approx(LN2 + 0.5 * nll)
    assert not any(build_objective(s()).needs_reference for s in (SimpoSettings, OrpoSettings, CpoSettings))
    for settings in (SimpoSettings(), OrpoSettings(), CpoSettings()):
        total, count = build_objective(settings).metrics(scores)["rewards/accuracies"]
        assert (float(total), count) == (0, 2), "ties are not correct"


# -- one loss in two clothes


def test_method_ipo_is_the_loss_type() -> None:
    scores = pairs(-torch.rand(4) * 9, -torch.rand(4) * 9, ref=-torch.rand(8), tokens=3)
    assert isinstance(build_objective(IpoSettings()), Ipo)
    for norm in ("mean", "sum"):
        own = IpoSettings(beta=0.3, ipo_norm=norm)
        assert loss(own, scores) == loss(dpo("ipo", beta=0.3, ipo_norm=norm), scores)


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    scores = pairs(-torch.rand(4) * 9, -torch.rand(4) * 9, tokens=3)  # a reference of 0 everywhere is uniform
    for e in (0.0, 0.2):
        assert loss(CpoSettings(cpo_alpha=0.7, label_smoothing=e), scores) == pytest.approx(
            loss(dpo(sft_weight=0.7, label_smoothing=e), scores)
        )


def test_divergences_meet_at_the_ends_of_alpha() -> None:
    scores = pairs(torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0]), ref=torch.tensor([-2.0, -2.5, -2.0, -1.0]))
    for end, same in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        assert loss(dpo(f_divergence="alpha", f_alpha=end), scores) == loss(dpo(f_divergence=same), scores)
    near = dpo(f_divergence="alpha", f_alpha=1 - 1e-12)
    assert loss(near, scores) == pytest.approx(loss(dpo(), scores), rel=1e-9)


def test_ld_alpha_counts_the_shared_length_in_full() -> None:
    """Chosen of 2 tokens, rejected of 4: with 0 the last two tokens are not there, with 1 it is plain dpo."""
    policy, zeros = torch.tensor([-1.0, -2, -1, -1, -5, -9]).double(), torch.zeros(6).double()
    scores = make_scores(policy, [2, 4], [2], ref_columns([zeros]))
    short = make_scores(policy[:4], [2, 2], [2], ref_columns([zeros[:4]]))
    assert loss(dpo(ld_alpha=0.0), scores) == loss(dpo(), short)
    assert loss(dpo(ld_alpha=0.5), scores) == pytest.approx(math.log1p(math.exp(-0.1 * (-3 + 2 + 7))))
    raw = {key: float(total) for key, (total, _) in Dpo(dpo(ld_alpha=0.5)).metrics(scores).items()}
    assert raw["rewards/margins"] == pytest.approx(0.1 * (-3 + 16)), "metrics are of the whole completions"


# -- symmetries

numbers = st.floats(-100, 0, allow_subnormal=False)
sides = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4)


@pytest.mark.parametrize("settings", [DpoSettings(), IpoSettings(), OrpoSettings(), SimpoSettings(), CpoSettings()])
@given(some=sides)
def test_swapping_the_sides_turns_the_margin_round(settings: MethodSettings, some: list[tuple[float, float]]) -> None:
    a, b = torch.tensor([x for x, _ in some]), torch.tensor([y for _, y in some])
    margins, swapped = (build_objective(settings).margins(pairs(*both, tokens=2)) for both in ((a, b), (b, a)))
    assert margins is not None and swapped is not None
    torch.testing.assert_close(margins, -swapped, rtol=0, atol=0)


@given(sides, st.floats(0.1, 10, allow_subnormal=False))
def test_sigmoid_sees_only_beta_times_log_probs(some: list[tuple[float, float]], k: float) -> None:
    a, b = torch.tensor([x for x, _ in some]).double(), torch.tensor([y for _, y in some]).double()
    scaled = loss(DpoSettings(beta=0.1 * k), pairs(a / k, b / k))
    assert scaled == pytest.approx(loss(DpoSettings(beta=0.1), pairs(a, b)), rel=1e-9)


@pytest.mark.parametrize("settings", PAIR_SETTINGS, ids=name)
def test_only_length_normalised_losses_ignore_repetition(settings: MethodSettings) -> None:
    objective = build_objective(settings)
    assert isinstance(objective, PairObjective)
    a, b, ref = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -1.0]), torch.tensor([-1.0, -2, -3, -1.5])
    once, twice = pairs(a, b, ref, tokens=1), pairs(2 * a, 2 * b, 2 * ref, tokens=2)
    same = torch.allclose(objective.preference(once), objective.preference(twice), rtol=1e-12)
    per_token = settings.method in ("orpo", "simpo", "ipo") or getattr(settings, "loss_type", "") in (
        "ipo",
        "sigmoid_norm",
    )
    summed = getattr(settings, "ipo_norm", "mean") == "sum"
    # another divergence is taken of the whole completion, before the length divides
    plain = getattr(settings, "f_divergence", "reverse_kl") == "reverse_kl"
    assert same == (per_token and plain and not summed)


# -- corners: exact, or not finite; never a wrong number


@pytest.mark.share(250)
@pytest.mark.parametrize("beta", [1e-8, 0.1, 1e8])
@pytest.mark.parametrize("size", [1e4, 1e-30, 0.0])
@pytest.mark.parametrize("settings", PAIR_SETTINGS, ids=name)
def test_extreme_log_probs_stay_finite(settings: MethodSettings, size: float, beta: float) -> None:
    if getattr(settings, "f_divergence", "reverse_kl") in ("forward_kl", "alpha"):
        size = min(size, 300.0)  # the ratio of the probabilities itself is beyond float64: see below
    settings = settings.model_copy(update={"simpo_beta" if settings.method == "simpo" else "beta": beta})
    a, b = torch.tensor([-size, -1.0, -size]), torch.tensor([-1.0, -size, -size])
    if settings.method == "orpo" and size < 1e-15:
        a, b = torch.tensor([-size, -1.0]), torch.tensor([-1.0, -2.0])  # a rejected probability of 1: see below
    value, gradient = loss_and_gradient(settings, pairs(a, b))
    assert math.isfinite(value) and torch.isfinite(gradient).all()


@pytest.mark.share(10)
@pytest.mark.parametrize("settings", PAIR_SETTINGS, ids=name)
def test_very_long_completions_lose_no_digit(settings: MethodSettings) -> None:
    """A million tokens, their log-probs in float32: a margin of 2 is the difference of sums of 16,384 each."""
    n = 2**20
    at, ref = torch.tensor([n * -(2.0**-6)]), torch.tensor([n * (-(2.0**-6) + 2.0**-20)])
    scores = pairs(at, ref, torch.cat([ref, at]), tokens=n)
    assert scores.logps.float().equal(scores.logps)
    scores = replace(scores, logps=scores.logps.float(), columns=scores.columns.map(Tensor.float))
    assert Dpo(DpoSettings()).margins(scores).tolist() == [-2.0]
    value, gradient = loss_and_gradient(settings, scores)
    assert math.isfinite(value) and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_prompts_of_one_token_have_no_likelihood() -> None:
    """The first token of a row is predicted from nothing."""
    scores = pairs(torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0]), tokens=2)
    none = make_scores(scores.logps, [2] * 4, [2, 2], Columns(per_prompt_token={"prompt_logps": scores.logps[:0]}))
    assert loss(OrpoSettings(orpo_nll="full"), none) == loss(OrpoSettings(), scores)


@pytest.mark.parametrize("settings", PAIR_SETTINGS, ids=name)
def test_log_probs_that_are_not_finite_are_not_hidden(settings: MethodSettings) -> None:
    scores = pairs(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]))
    assert math.isnan(loss(settings, scores))


def labelled(ratios: list[float], labels: list[bool], others: list[float]) -> Scores:
    """Completions of one token with these log-ratios to a reference of 0."""

    def alone(values: list[float]) -> Scores:
        ones = [1] * len(values)
        return make_scores(torch.tensor(values).double(), ones, ones, ref_columns([torch.zeros(len(values)).double()]))

    scores = alone(ratios)
    columns = scores.columns.beside(Columns(per_group={"labels": torch.tensor(labels)}))
    return replace(scores, columns=columns, also={"mismatched": alone(others)})


def test_kto_where_policy_and_reference_agree() -> None:
    scores = labelled([0.0, 0.0, 0.0], [True, False, False], [0.0, 0.0])
    settings = KtoSettings(desirable_weight=2.0, undesirable_weight=0.5)
    assert loss(settings, scores) == pytest.approx(0.5 * (2 + 0.5 + 0.5) / 3)
    total, count = build_objective(settings).metrics(scores)["rewards/accuracies"]
    assert (float(total), count) == (0, 3), "ties are not correct"


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_one_label_only(label: bool) -> None:
    scores = labelled([-3.0, -1.0], [label, label], [2.0, 4.0])
    value, gradient = loss_and_gradient(KtoSettings(beta=0.5), scores)
    sign = 1 if label else -1
    expected = [1 / (1 + math.exp(sign * 0.5 * (u - 3.0))) for u in (-3.0, -1.0)]
    assert value == pytest.approx(sum(expected) / 2) and torch.isfinite(gradient).all()
    counts = {key: int(count) for key, (_, count) in build_objective(KtoSettings()).metrics(scores).items()}
    assert {counts["rewards/chosen"], counts["rewards/rejected"]} == {0, 2}


@pytest.mark.parametrize("beta", [1e-8, 1e8])
@pytest.mark.parametrize("others", [[-1e4, -1e4], [1e4, 1e4]])
def test_kto_stays_finite(beta: float, others: list[float]) -> None:
    value, gradient = loss_and_gradient(KtoSettings(beta=beta), labelled([-1e4, 0.0, 1e4], [True, False, True], others))
    assert math.isfinite(value) and torch.isfinite(gradient).all()


def test_a_mismatched_score_that_is_not_finite_is_not_hidden() -> None:
    assert math.isnan(loss(KtoSettings(), labelled([-1.0, -2.0], [True, False], [math.nan, 0.0])))


def test_divergences_beyond_float64_are_not_hidden() -> None:
    far = pairs(torch.tensor([-1e4]), torch.tensor([-1.0]))
    for settings in (dpo(f_divergence="forward_kl"), dpo(f_divergence="alpha", f_alpha=0.2)):
        assert not math.isfinite(loss(settings, far))


def test_odds_at_probability_one() -> None:
    def at(chosen: float, rejected: float) -> tuple[float, Tensor]:
        leaf = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
        value = odds_ratio_loss(leaf[:1], leaf[1:])
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    value, gradient = at(0.0, -1.0)
    odds = math.exp(-1.0) / (1 - math.exp(-1.0))
    # the limit from below: d/da log1p(odds (1 - e^a) / e^a) -> -odds
    assert value == 0 and gradient.tolist() == pytest.approx([-odds, 0.0])
    near, slope = at(-1e-12, -1.0)
    assert near == pytest.approx(1e-12 * odds, rel=1e-6) and float(slope[0]) == pytest.approx(-odds, rel=1e-6)
    assert at(-1.0, 0.0)[0] == math.inf
    assert math.isnan(at(0.0, 0.0)[0]), "0 / 0"
    assert at(-1e4, -1e-3)[0] == pytest.approx(1e4 - 1e-3 - math.log(-math.expm1(-1e-3)), rel=1e-12)
    assert at(-1e-3, -1e4)[0] == pytest.approx(0, abs=1e-300)


def test_discopop_far_from_zero() -> None:
    """exp(-z) sg(z / tau) vanishes for z far below 0, though its first factor overflows."""
    value, gradient = loss_and_gradient(dpo("discopop"), pairs(torch.tensor([-1e5]), torch.zeros(1)))
    assert value == pytest.approx(1e4) and gradient.tolist() == pytest.approx([-0.1, 0.1])


def test_smoothing_at_its_bounds() -> None:
    almost = math.nextafter(0.5, 0)
    scores = pairs(torch.tensor([-3.0]), torch.tensor([-3.0 - 1e-9]))
    for settings in (*(dpo(x) for x in ("sigmoid", "aot", "aot_unpaired", "robust", "exo_pair")), CpoSettings()):
        given = settings.model_dump()
        at_bound = type(settings)(**{**given, "label_smoothing": almost})
        value, gradient = loss_and_gradient(at_bound, scores)
        assert math.isfinite(value) and torch.isfinite(gradient).all()
        for beyond in (0.5, -1e-9, math.nan):
            with pytest.raises(ConfigError):
                type(settings)(**{**given, "label_smoothing": beyond})
    assert math.isfinite(loss(dpo("exo_pair", label_smoothing=3e-308), scores))
    with pytest.raises(ConfigError, match=r"label_smoothing: 0\.001"):
        DpoSettings(loss_type="exo_pair")


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=5))
def test_sft_means_are_over_tokens_or_sequences(rows: list[list[float]]) -> None:
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    scores = make_scores(flat, [len(r) for r in rows], [1] * len(rows))

    def value(settings: SftSettings) -> float:
        objective = Sft(settings)
        return float(objective.terms(scores)["nll"]) / objective.units["nll"](scores.structure)

    assert value(SftSettings()) == pytest.approx(-float(flat.mean()), abs=1e-12)
    by_hand = sum(sum(r) / len(r) for r in rows) / len(rows)
    assert value(SftSettings(loss_reduction="sequences")) == pytest.approx(-by_hand, abs=1e-9)
