"""The objective on groups against the same losses in plain numpy, and its gradient against differences of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from group_papers import Step, entropy, step_loss
from scored import make_scores
from strop.batch import Scores
from strop.columns import Columns, Structure
from strop.config.grpo_settings import Advantage, Algorithm
from strop.config.methods import GrpoSettings, MethodSettings
from strop.errors import ConfigError, DataError
from strop.objectives.advantages import advantages, group_stds, normalised_sum
from strop.objectives.base import Objective, build_objective
from variants import GROUP_SETTINGS, grpo, name

LENGTHS = [(3, 5, 1), (7, 2), (4, 4, 4, 4), (1, 6), (2, 9, 3)]


def make_step(seed: int) -> Step:
    """Five groups; the rewards of the fourth are all the same. Ratios lie on both sides of every bound. What is cut off
    differs: some of several groups, a group as a whole, everything."""
    draw = np.random.default_rng(seed)
    cut_off = ((1, 3, 9), (4, 5), range(10))[seed]

    def completion(n: int, alike: bool) -> dict[str, Any]:
        pi = -draw.gamma(1.0, 1.5, n) - 1.5
        old, ref = (np.minimum(pi + draw.normal(0, 0.4, n), -1e-3) for _ in range(2))
        sampler = np.minimum(old + draw.normal(0, 0.15, n), -1e-3)
        reward = 0.5 if alike else float(draw.choice([0.0, 0.5, 1.0, 2.0]))
        ended = n not in cut_off
        numbers = {"pi": pi, "old": old, "ref": ref, "sampler": sampler, "r": reward, "ended": ended}
        apart = np.random.default_rng([seed, n]).dirichlet(np.ones(5), n)
        return {**numbers, "p": apart, "each": (reward, n % 3 / 3), "weights": (1.0, 0.5)}

    return [[completion(n, i == 3) for n in lengths] for i, lengths in enumerate(LENGTHS)]


def to_scores(step: Step, objective: Objective[MethodSettings], drop: Sequence[str] = ()) -> Scores:
    flat = [y for group in step for y in group]
    names = {"old": "old_logps", "ref": "ref_logps", "sampler": "sampler_logps"}
    per_token = {
        column: torch.tensor(np.concatenate([y[key] for y in flat])) for key, column in names.items() if key not in drop
    }
    per_token["entropies"] = torch.tensor([entropy(p) for y in flat for p in y["p"]], dtype=torch.float64)
    per_completion = {
        key: torch.tensor([float(y[of]) for y in flat]) for key, of in (("rewards", "r"), ("ended", "ended"))
    }
    of_groups = [normalised_sum([*zip(*(y["each"] for y in g), strict=True)], g[0]["weights"]) for g in step]
    per_completion["normalised_rewards"] = torch.tensor([x for own in of_groups for x in own], dtype=torch.float64)
    columns = Columns(per_token=per_token, per_completion=per_completion)
    logps = torch.tensor(np.concatenate([y["pi"] for y in flat]))
    scores = make_scores(logps, [len(y["pi"]) for y in flat], [len(group) for group in step], columns)
    return replace(scores, columns=columns.beside(objective.derive(scores.structure, columns)))


def moved(step: Step, directions: Mapping[int, Any], eps: float) -> Step:
    return [[{**y, "pi": y["pi"] + eps * directions[id(y)]} for y in group] for group in step]


def loss_of(objective: Objective[MethodSettings], scores: Scores) -> torch.Tensor:
    loss = sum(term / objective.units[t](scores.structure) for t, term in objective.terms(scores).items())
    assert isinstance(loss, torch.Tensor) and loss.dtype == torch.float64
    return loss


@pytest.mark.parametrize("settings", GROUP_SETTINGS, ids=name)
def test_loss_and_gradient_are_those_of_the_paper(settings: GrpoSettings) -> None:
    objective = build_objective(settings)
    for seed in range(3):
        step = make_step(seed)
        scores = to_scores(step, objective)
        leaf = scores.logps.requires_grad_()
        loss = loss_of(objective, scores)
        assert float(loss.detach()) == pytest.approx(step_loss(settings, step, step), rel=1e-11, abs=1e-13)
        (gradient,) = torch.autograd.grad(loss, leaf)
        draw = np.random.default_rng(seed)
        for _ in range(3):
            way = draw.normal(size=len(leaf))
            parts = iter(np.split(way, np.cumsum([n for group in LENGTHS for n in group])[:-1]))
            directions = {id(y): next(parts) for group in step for y in group}
            eps = 1e-6
            ahead, behind = (step_loss(settings, moved(step, directions, e), step) for e in (eps, -eps))
            along = float(gradient @ torch.tensor(way))
            assert along == pytest.approx((ahead - behind) / (2 * eps), rel=1e-6, abs=1e-8)


WEIGHTS: Mapping[str, Callable[[Any, int, int], Any]] = {
    **dict.fromkeys(("grpo", "gspo", "gmpo", "sapo", "gdpo"), lambda lengths, c, m: 1 / lengths / c),
    **dict.fromkeys(("dapo", "bnpo", "cispo", "reinforce++"), lambda lengths, c, m: 1 / m + 0 * lengths),
    **dict.fromkeys(("rloo", "maxrl"), lambda lengths, c, m: 1 / c + 0 * lengths),
    "dr_grpo": lambda lengths, c, m: 1 / (16 * c) + 0 * lengths,
}
"""Algorithm -> what the gradient of a token's log-prob counts, by the length of its completion, the number of
completions and that of tokens."""


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_of_fresh_samples_every_algorithm_is_a_weighted_policy_gradient(algorithm: str) -> None:
    """No gate acts at a ratio of 1; without old log-probs it is 1 everywhere."""
    objective, step = build_objective(grpo(algorithm)), make_step(0)
    scores = to_scores(step, objective, drop=("old",))
    leaf = scores.logps.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(objective, replace(scores, logps=leaf)), leaf)
    lengths, structure = scores.lengths[scores.completion_index], scores.structure
    weights = WEIGHTS[algorithm](lengths, structure.num_completions, structure.num_tokens)
    torch.testing.assert_close(gradient, -scores["advantages"] * weights, rtol=1e-12, atol=1e-15)


def test_an_axis_that_is_given_wins() -> None:
    assert GrpoSettings(algorithm="dapo").epsilon_high == 0.28
    assert (
        GrpoSettings(algorithm="dapo", epsilon_high=0.3, aggregation="prompt")
        .axes()
        .startswith("advantage group, token ratios, gate clip 0.2 / 0.3, aggregation prompt")
    )
    assert GrpoSettings(algorithm="gspo", gate="cispo").epsilon_high == 4.0, "the bounds are those of the gate"
    assert GrpoSettings(algorithm="cispo", gate="clip").epsilon == 0.2
    assert GrpoSettings(gate="gmpo").importance_sampling_level is None
    (line,) = build_objective(GrpoSettings(algorithm="cispo", beta=0.1)).describe()
    assert line == (
        "algorithm cispo: advantage group, token ratios, gate cispo 1 / 4, aggregation token, KL 0.1 in the loss (k3, "
        "times the ratio), entropy bonus 0, sampler correction none"
    )


@pytest.mark.parametrize("gate", ["sapo", "none"])
def test_what_a_gate_does_not_read_is_refused(gate: str) -> None:
    with pytest.raises(ConfigError, match=f"gate {gate} does not read it"):
        GrpoSettings(gate=gate, epsilon=0.1)  # type: ignore[arg-type]


def test_settings_that_hold_the_policy_to_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="mean gradient is 0"):
        GrpoSettings(beta=0.1, kl_estimator="k1", use_bias_correction_kl=False)
    with pytest.raises(ConfigError, match="beta is 0: nothing reads it"):
        GrpoSettings(ref_model_id="org/model")
    with pytest.raises(ConfigError, match="there is none"):
        _ = build_objective(GrpoSettings(algorithm="dr_grpo")).units


def test_equal_rewards_have_no_spread_to_the_last_bit() -> None:
    """0.1 three times has a mean that is not 0.1: a spread of 1e-17 would be divided by itself."""
    structure = Structure((3, 2), (1,) * 5, (1, 1))
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7], dtype=torch.float64)
    assert (group_stds(rewards, structure.group_index(), 2) == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in get_args(Advantage) if kind != "none"])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 11])
def test_equal_rewards_teach_nothing_to_the_last_bit(kind: str, size: int) -> None:
    """An optimiser that divides by the size of the gradient would make a whole step of what rounding leaves."""
    lengths = tuple(1 + i % 3 for i in range(2 * size))
    structure = Structure((size, size), lengths, (1, 1))
    of_step = kind in ("reinforce++", "gdpo")  # they compare all completions of a step
    for value in (0.1, 0.7, 1e6 + 0.1, 1e9 / 7, 1e-7):
        rewards = torch.tensor([value] * size + [value if of_step else 3 * value] * size, dtype=torch.float64)
        assert (advantages(kind, rewards, structure) == 0).all()


def test_a_negative_reward_is_no_likelihood() -> None:
    with pytest.raises(DataError, match="a reward is -1"):
        advantages("maxrl", torch.tensor([-1.0, 1.0]), Structure((2,), (1, 1), (1,)))


def test_metrics_are_explained_and_counted() -> None:
    known: set[str] = set()
    for settings in GROUP_SETTINGS:
        objective = build_objective(settings)
        metrics = objective.metrics(to_scores(make_step(0), objective))
        assert all(np.isfinite(float(total)) and count > 0 for total, count in metrics.values())
        known |= metrics.keys()
    assert known == set(objective.METRICS)


def test_metrics_say_what_they_are() -> None:
    objective, step = build_objective(grpo(epsilon=0.1, epsilon_high=0.3, beta=0.1)), make_step(1)
    metrics = objective.metrics(to_scores(step, objective))
    value = {name: float(total) / count for name, (total, count) in metrics.items()}
    rewards = [np.array([y["r"] for y in group]) for group in step]
    assert value["reward"] == pytest.approx(np.concatenate(rewards).mean())
    assert value["reward_std"] == pytest.approx(np.mean([r.std(ddof=1) for r in rewards]))
    assert 0 < value["frac_reward_zero_std"] == pytest.approx(np.mean([len(set(r)) == 1 for r in rewards]))
    assert value["completions/mean_length"] == pytest.approx(np.mean([n for group in LENGTHS for n in group]))
    w = np.concatenate([np.exp(y["pi"] - y["old"]) for group in step for y in group])
    a = to_scores(step, objective)["advantages"].numpy()
    assert 0 < value["clip_ratio/low_mean"] == pytest.approx(np.mean((w < 0.9) & (a < 0)))
    assert 0 < value["clip_ratio/high_mean"] == pytest.approx(np.mean((w > 1.3) & (a > 0)))
