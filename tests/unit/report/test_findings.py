"""Each finding on a run folder that has what it looks for, and on a healthy one that has not."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.cli.run_config import parse, parser_of_run
from strop.config import load_config
from strop.config.dump import to_yaml
from strop.config.grpo_settings import ALGORITHMS
from strop.config.schema import KEYS
from strop.config.yamlfile import write_value
from strop.report import findings
from strop.report.checks import accuracy, course, data, pairs, sampled_groups, sampled_rewards, start, unpaired
from strop.report.facts import LN2
from strop.report.findings import THRESHOLDS, Severity, Thresholds
from strop.report.pair_accuracy import Accuracy, looks_exchanged
from strop.report.run_record import read_run
from strop.report.write import examine
from strop.runfiles import EVALUATIONS, row_losses_array

ROOT = Path(__file__).resolve().parents[3]
FAIL, WARN, NOTE, OK, UNCHECKED = Severity
STEPS = 100


def per_token(chosen: float, rejected: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Sides that end so many nats per token from the reference."""

    def change(line: dict[str, Any]) -> dict[str, Any]:
        done = line["step"] / STEPS
        c, r = (0.1 * 20 * side * done for side in (chosen, rejected))
        return {"rewards/chosen": c, "rewards/rejected": r, "rewards/margins": c - r}

    return change


def held(accuracy: float, train: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {"rewards/accuracies": accuracy if line["split"] == "eval" and line["step"] else train}


def constant(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {name.replace("__", "/"): value for name, value in values.items()}


def rising(start_: float, end: float, split: str = "train") -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {"loss": start_ + (end - start_) * line["step"] / STEPS} if line["split"] == split else {}


BROKEN: list[tuple[str, Severity, Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]] = [
    ("rate-zero", FAIL, constant(learning_rate=0.0), {}),
    ("gradient-zero", FAIL, constant(grad_norm=0.0), {}),
    ("gradient-zero", NOTE, lambda line: {"grad_norm": 0.0 if line["step"] > 90 else 1.0}, {}),
    ("weights-unmoved", FAIL, constant(changed_fraction=0.002), {}),
    ("weights-unmoved", WARN, constant(changed_fraction=0.05), {}),
    ("reference-mismatch", FAIL, constant(rewards__chosen=3.0), {}),
    ("reference-mismatch", UNCHECKED, constant(rewards__chosen=3.0), {"post_training.ref_model_id": "org/other"}),
    ("first-loss", FAIL, lambda line: {"loss": 0.8} if line["step"] == 0 else {}, {}),
    ("same-pairs", FAIL, lambda line: {"num_zero_signal_groups": 16} if line["split"] == "train" else {}, {}),
    ("same-pairs", WARN, lambda line: {"num_zero_signal_groups": 1} if line["split"] == "train" else {}, {}),
    ("not-finite", FAIL, lambda line: {"loss": None} if line["step"] == 100 else {}, {}),
    ("not-finite", WARN, lambda line: {"num_skipped_steps": 1} if line["step"] == 50 else {}, {}),
    ("worse-than-start", FAIL, rising(math.log(2), 0.9, "eval"), {}),
    ("worse-than-start", WARN, rising(math.log(2), 0.7, "eval"), {}),
    ("gradient-spikes", NOTE, lambda line: {"grad_norm": 80.0} if line["step"] == 60 else {}, {}),
    ("gradient-spikes", WARN, lambda line: {"grad_norm": 80.0} if line["step"] in (40, 60, 80) else {}, {}),
    ("always-clipped", NOTE, constant(clipped=1.0, grad_norm=50.0), {}),
    ("eval-size", NOTE, lambda line: {"num_groups": 100} if line["split"] == "eval" else {}, {}),
    ("splits-disagree", FAIL, held(0.2, 0.8), {}),
    ("accuracy-falls", FAIL, held(0.2, 0.2), {}),
    ("accuracy-half", WARN, held(0.51, 0.8), {}),
    ("likelihood-displacement", NOTE, per_token(-0.1, -0.25), {}),
    ("likelihood-displacement", WARN, per_token(-0.25, -0.8), {}),
    ("likelihood-displacement", FAIL, per_token(-0.55, -0.6), {}),
    ("drift", NOTE, per_token(0.1, -0.4), {}),
    ("drift", WARN, per_token(0.1, -0.9), {}),
    ("drift", FAIL, per_token(0.1, -4.0), {}),
    ("rate-low", WARN, per_token(0.0005, -0.0005), {}),
    ("rate-high", FAIL, rising(math.log(2), 3.0), {}),
    ("rate-high", WARN, lambda line: {"loss": 3.0 if 20 < line["step"] < 40 else 0.5 if line["step"] else LN2}, {}),
    ("saturated", NOTE, lambda line: {"rewards/accuracies": 1.0 if line["split"] == "train" else 0.8}, {}),
    ("simpo-beta", WARN, constant(), {"post_training.method": "simpo", "post_training.simpo_beta": 0.1}),
    ("few-steps", NOTE, lambda line: {"step": line["step"] // 4}, {}),
]


@pytest.mark.parametrize(("id_", "severity", "change", "settings"), BROKEN, ids=[f"{b[0]}-{b[1]}" for b in BROKEN])
def test_a_finding_is_raised_by_what_it_looks_for(
    id_: str,
    severity: Severity,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    settings: dict[str, Any],
    make: Callable[..., Any],
) -> None:
    healthy = {f.id: f.severity for f in make(name="healthy").diagnose().findings}
    assert healthy.get(id_, OK) == OK
    made = make(change)
    made.settings |= settings
    found = made.finding(id_)
    assert found.severity == severity
    if severity != UNCHECKED:
        assert found.numbers and found.remedies


LENGTH = "completions/mean_length"


def sampled(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a run of grpo that goes well."""
    done = line["step"] / STEPS
    of_both = {"reward": 0.4 + 0.3 * done, "completions/mean_length": 40.0, "completions/clipped_ratio": 0.02}
    if line["split"] == "eval":
        return {**of_both, "reward_high": of_both["reward"] + 0.03, "num_groups": 800, "loss": None}
    of_training = {"entropy": 2.0 - 0.8 * done, "frac_reward_zero_std": 0.1, "clip_ratio/region_mean": 0.01, "kl": 0.1}
    by_length = {"rewards/length_correlation": 0.2, f"{LENGTH}_better": 38.0, f"{LENGTH}_worse": 42.0}
    each = {"rewards/format/mean": 0.3 + 0.6 * done, "rewards/format/std": 0.45 - 0.4 * done}
    each |= {"rewards/own.py:right/mean": 0.4 + 0.1 * done, "rewards/own.py:right/std": 0.5}
    return {**of_both, **of_training, **by_length, **each, "sampling/sampling_logp_difference/mean": 0.001}


def towards(name: str, end: float, split: str = "train") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A number of a run of grpo that goes from where it begins to `end`."""

    def change(line: dict[str, Any]) -> dict[str, Any]:
        start_ = sampled({"step": 0, "split": split})[name]
        value = start_ + (end - start_) * line["step"] / STEPS
        high = {"reward_high": value + 0.03} if name == "reward" else {}
        return {name: value, **high} if line["split"] == split else {}

    return change


def noisy(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A number of a run of grpo that ends lower than it began, by less than chance from line to line makes likely."""
    return lambda line: {name: 0.5 + 0.3 * float(np.random.default_rng(29_000 + line["step"]).normal())}


def both(*changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {name: value for change in changes for name, value in change(line).items()}


FLAT, LONG_WRONG = towards("reward", 0.41, "eval"), towards(f"{LENGTH}_worse", 60.0)
RIGHT_FALLS = towards("rewards/own.py:right/mean", 0.1)
GROUPS: list[tuple[str, Severity, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("completions-clipped", NOTE, constant(completions__clipped_ratio=0.2)),
    ("completions-clipped", WARN, constant(completions__clipped_ratio=0.5)),
    ("completions-clipped", FAIL, constant(completions__clipped_ratio=0.99)),
    ("entropy-collapse", WARN, lambda line: {"entropy": 2.0 if line["step"] < 20 else 0.2}),
    ("entropy-collapse", NOTE, lambda line: {"entropy": 2.0 if line["step"] < 70 else 0.2}),
    ("ratios-clipped", WARN, constant(clip_ratio__region_mean=0.3)),
    ("kl-high", WARN, towards("kl", 4.0)),
    ("kl-high", FAIL, towards("kl", 40.0)),
    ("sampler-mismatch", WARN, constant(sampling__sampling_logp_difference__mean=0.05)),
    ("sampler-mismatch", FAIL, constant(sampling__sampling_logp_difference__mean=0.5)),
    ("longer-not-better", OK, towards(LENGTH, 90.0)),
    ("longer-not-better", WARN, both(towards(LENGTH, 90.0), FLAT)),
    ("longer-not-better", WARN, both(towards(LENGTH, 90.0), towards("completions/clipped_ratio", 0.38))),
    ("worse-grow-longer", WARN, LONG_WRONG),
    ("worse-grow-longer", WARN, both(LONG_WRONG, towards(LENGTH, 90.0), FLAT)),
    ("worse-grow-longer", OK, both(LONG_WRONG, towards(f"{LENGTH}_better", 62.0))),
    ("worse-grow-longer", OK, both(LONG_WRONG, towards(f"{LENGTH}_better", 50.0))),
    ("length-rewarded", WARN, constant(rewards__length_correlation=0.6)),
    ("length-rewarded", OK, constant(rewards__length_correlation=-0.6)),
    ("one-reward-wins", WARN, RIGHT_FALLS),
    ("one-reward-wins", FAIL, both(RIGHT_FALLS, towards("reward", 0.3, "eval"))),
    ("one-reward-wins", OK, both(RIGHT_FALLS, constant(**{"rewards/format/std": 0.45}))),
    ("one-reward-wins", OK, both(RIGHT_FALLS, towards("rewards/format/mean", 0.2))),
    ("one-reward-wins", OK, noisy("rewards/own.py:right/mean")),
    ("ratios-never-clipped", NOTE, constant(clip_ratio__region_mean=0.0)),
    ("reward-hacking", WARN, FLAT),
    ("reward-hacking", FAIL, towards("reward", 0.3, "eval")),
    ("worse-than-start", FAIL, both(towards("reward", 0.3), towards("reward", 0.3, "eval"))),
    ("groups-without-signal", WARN, constant(frac_reward_zero_std=0.6)),
]


REWARDS = [{"name": "format", "weight": 0.5}, {"name": "own.py:right", "weight": 1.0}]


@pytest.fixture
def make_sampled(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(change: Callable[[dict[str, Any]], dict[str, Any]], **settings: Any) -> Any:
        found = make(lambda line: {**sampled(line), **change({**line, **sampled(line)})})
        found.settings |= {"post_training.method": "grpo", "rollout.enabled": True, "rollout.num_generations": 4}
        found.settings |= {"rollout.dynamic_sampling": False, "training.max_completion_length": 64}
        found.settings |= {"rollout.num_iterations": 2, "post_training.epsilon_high": 0.2}
        found.settings |= {
            "post_training.entropy_coef": 0.0,
            "rollout.temperature": 0.7,
            "rewards": REWARDS,
            **settings,
        }
        return found

    return made


@pytest.mark.parametrize(("id_", "severity", "change"), GROUPS, ids=[f"{g[0]}-{g[1]}" for g in GROUPS])
def test_a_finding_about_groups_is_raised_by_what_it_looks_for(
    id_: str, severity: Severity, change: Callable[[dict[str, Any]], dict[str, Any]], make_sampled: Callable[..., Any]
) -> None:
    found = make_sampled(change)
    assert [f.id for f in found.diagnose().raised][:1] == ([] if severity is OK else [id_])
    assert found.finding(id_).severity == severity
    assert severity is OK or (found.finding(id_).numbers and found.finding(id_).remedies)


def test_a_reward_that_is_hacked_is_shown_where_it_is_highest(make_sampled: Callable[..., Any]) -> None:
    found = make_sampled(
        both(towards("reward", 0.3, "eval"), lambda line: {"reward": 9.0} if line["step"] == 70 else {})
    )
    finding = found.finding("reward-hacking")
    assert " and fell by " in finding.claim
    command = shlex.split(finding.remedies[0].command(found.path))
    assert command == ["strop", "replay", str(found.path), "--step", "70", "--rows"]


def test_a_run_of_groups_that_goes_well_raises_nothing(make_sampled: Callable[..., Any]) -> None:
    assert make_sampled(lambda line: {}).diagnose().raised == []


def test_a_penalty_that_is_paid_less_has_not_fallen(make_sampled: Callable[..., Any]) -> None:
    """A reward of negative weight: what it counts is to become rare."""
    penalty = [REWARDS[0], {**REWARDS[1], "weight": -1.0}]
    assert make_sampled(RIGHT_FALLS, rewards=penalty).finding("one-reward-wins").severity is OK


def test_ratios_of_one_update_per_sampling_are_never_clipped(make_sampled: Callable[..., Any]) -> None:
    made = make_sampled(constant(clip_ratio__region_mean=0.0), **{"rollout.num_iterations": 1})
    assert "ratios-never-clipped" not in [f.id for f in made.diagnose().findings]


def test_a_policy_that_becomes_sure_is_advised_an_entropy_bonus(make_sampled: Callable[..., Any]) -> None:
    for weight, advised in ((0.0, 0.001), (0.01, 0.02)):
        made = make_sampled(constant(), **{"post_training.entropy_coef": weight})
        made.lines = [{**line, "entropy": 2.0 if line["step"] < 20 else 0.2} for line in made.lines]
        found = [dict(r.settings) for r in made.finding("entropy-collapse").remedies]
        assert {"post_training.entropy_coef": advised} in found


@pytest.mark.parametrize(
    ("share", "high", "raised"),
    [(0.9, 0.4, "forecast-exceeded"), (0.45, 0.4, None), (0.9, 0.95, "groups-without-signal")],
)
def test_a_forecast_that_is_exceeded_is_told_in_place_of_what_it_explains(
    share: float, high: float, raised: str | None, make_sampled: Callable[..., Any]
) -> None:
    made = make_sampled(constant(frac_reward_zero_std=share))
    forecast = {"without_signal": high - 0.1, "low": high - 0.2, "high": high, "num_prompts": 32}
    (made.write() / "forecast.json").write_text(json.dumps(forecast))
    found = made.diagnose()
    assert [(f.id, f.severity) for f in found.raised] == ([(raised, FAIL)] if raised else [])
    assert {"forecast-exceeded", "groups-without-signal"} >= {f.id for f in found.raised}
    if raised == "forecast-exceeded":
        assert {"rollout.temperature": 1.0} in [dict(r.settings) for r in found.raised[0].remedies]


def test_completions_that_are_cut_and_left_out_are_the_cause_of_a_gradient_of_zero(
    make_sampled: Callable[..., Any],
) -> None:
    change = constant(completions__clipped_ratio=1.0, grad_norm=0.0)
    made = make_sampled(change, **{"post_training.mask_truncated_completions": True})
    (found,) = made.diagnose().raised
    assert (found.id, found.severity) == ("completions-clipped", FAIL)
    assert "mask_truncated_completions" in found.claim
    longer = {"training.max_completion_length": 128, "training.max_seq_length": 512 + 64}
    assert longer in [dict(r.settings) for r in found.remedies]
    counted = make_sampled(change, **{"post_training.mask_truncated_completions": False})
    assert {"completions-clipped", "gradient-zero"} == {f.id for f in counted.diagnose().raised}
    assert not any("pair" in r.words or "beta" in r.words for r in counted.finding("gradient-zero").remedies)


@pytest.mark.parametrize(
    ("first_epoch", "told"), [(0.5, "accuracy-half"), (0.7, "splits-disagree")], ids=["random", "exchanged"]
)
def test_labels_that_are_learnt_by_heart_are_not_exchanged(
    first_epoch: float, told: str, make: Callable[..., Any]
) -> None:
    """Where both lose validation pairs: exchanged ones are won before they are trained on, random ones are not."""

    def change(line: dict[str, Any]) -> dict[str, Any]:
        held_out = line["split"] == "eval" and line["step"] > 0
        return {"rewards/accuracies": 0.3 if held_out else first_epoch if line["step"] <= STEPS / 2 else 0.95}

    made = make(change)
    made.plan["steps_per_epoch"] = STEPS // 2
    assert told in [f.id for f in made.diagnose().raised]
    assert len({"accuracy-half", "splits-disagree"} & {f.id for f in made.diagnose().raised}) == 1


@pytest.mark.parametrize(
    ("held_out", "told"), [(0.40, "splits-disagree"), (0.48, "accuracy-half")], ids=["exchanged", "a coin"]
)
def test_few_validation_pairs_are_held_against_training_pairs_at_first_sight(
    held_out: float, told: str, make: Callable[..., Any]
) -> None:
    """Of 60 pairs, 0.40 may be a coin by itself (0.29 to 0.53)."""

    def change(line: dict[str, Any]) -> dict[str, Any]:
        if line["split"] == "eval":
            return {"rewards/accuracies": held_out if line["step"] else 0.0, "num_groups": 60}
        return {"rewards/accuracies": 0.6}

    made = make(change)
    made.plan["steps_per_epoch"] = STEPS // 2
    assert {f.id for f in made.diagnose().raised} & {"splits-disagree", "accuracy-half"} == {told}


@pytest.mark.parametrize(("share", "of_hundred"), [(0.65, {20: 71, 60: 88, 160: 98}), (0.6, {20: 42, 60: 69, 160: 86})])
def test_how_often_an_exchange_is_told_is_as_the_page_says(share: float, of_hundred: dict[int, int]) -> None:
    """By the binomial distribution, for validation pairs that are won at 1 - share."""

    def counted(n: int, p: float) -> list[tuple[float, Accuracy]]:
        found = [(math.comb(n, k) * p**k * (1 - p) ** (n - k), Accuracy.of(k / n, n)) for k in range(n + 1)]
        return [(chance, accuracy) for chance, accuracy in found if chance > 1e-7]

    fresh = counted(200, share)
    for rows, told in of_hundred.items():
        chance = sum(
            a * b
            for a, held in counted(rows, 1 - share)
            for b, seen in fresh
            if held.high < 0.5 or looks_exchanged(seen, held)
        )
        assert round(100 * chance) == told
    page = (Path(__file__).parents[3] / "docs" / "findings.md").read_text(encoding="utf-8")
    assert all(
        str(told) in page.partition("### splits-disagree")[2].partition("###")[0] for told in of_hundred.values()
    )


@pytest.mark.parametrize("is_same", [True, False])
def test_a_teacher_that_is_the_student_is_told_in_place_of_what_rounding_does(
    is_same: bool, make: Callable[..., Any]
) -> None:
    made = make(lambda line: {"loss": 1e-9 + 1e-6 * line["step"] if line["split"] == "eval" else 1e-8})
    made.settings |= {"post_training.method": "distill", "post_training.teacher_model_id": "org/model"}
    made.plan["teacher_is_student"] = is_same
    found = {f.id: f.severity for f in made.diagnose().findings}
    assert found["teacher-is-student"] == (FAIL if is_same else OK)
    assert found.get("worse-than-start", OK) == found.get("risen", OK) == OK, "it is rounding"


@pytest.mark.parametrize(("share", "severity"), [(0.3, OK), (0.6, WARN), (1.0, FAIL)])
def test_groups_without_signal_are_the_cause_of_a_gradient_of_zero(
    share: float, severity: Severity, make: Callable[..., Any]
) -> None:
    norm = 0.0 if share == 1 else 1.0
    made = make(lambda line: {"frac_reward_zero_std": share, "grad_norm": norm} if line["split"] == "train" else {})
    made.settings |= {"post_training.method": "grpo", "rollout.num_generations": 4, "rollout.dynamic_sampling": False}
    found = made.finding("groups-without-signal")
    assert found.severity == severity
    assert "gradient-zero" not in [f.id for f in made.diagnose().raised]
    if severity != OK:
        assert {"rollout.num_generations": 8} in [dict(r.settings) for r in found.remedies]


@pytest.mark.parametrize(("advantage", "is_told"), [("group", True), ("reinforce++", False), ("none", False)])
def test_groups_of_equal_rewards_teach_where_completions_count_by_themselves(
    advantage: str, is_told: bool, make_sampled: Callable[..., Any]
) -> None:
    """As those of one completion do, which all have the same reward."""
    made = make_sampled(constant(frac_reward_zero_std=1.0), **{"post_training.advantage": advantage})
    assert ("groups-without-signal" in {f.id for f in made.diagnose().raised}) == is_told
    forecast = {"without_signal": 0.3, "low": 0.2, "high": 0.4, "num_prompts": 32}
    (made.write() / "forecast.json").write_text(json.dumps(forecast))
    assert ("forecast-exceeded" in {f.id for f in made.diagnose().raised}) == is_told


DATA: list[tuple[str, Severity, str, Any]] = [
    ("duplicates", NOTE, "train.findings.duplicates", 3),
    ("duplicates", WARN, "train.findings.duplicates", 80),
    ("contradictions", WARN, "train.findings.contradictions", 8),
    ("contradictions", FAIL, "train.findings.contradictions", 80),
    ("double-bos", FAIL, "train.findings.double_bos", 1),
    ("leakage", WARN, "eval.findings.leaked_prompts", 3),
    ("leakage", FAIL, "eval.findings.leaked_prompts", 300),
    ("leakage", FAIL, "eval.findings.leaked_rows", 30),
    ("no-end-token", WARN, "train.findings.missing_eos", 200),
    ("no-end-token", FAIL, "train.findings.missing_eos", 2000),
    ("completions-cut", WARN, "train.completions_cut", 200),
    ("completions-cut", FAIL, "train.completions_cut", 800),
    ("rows-lost", WARN, "train.refused", {"no prompt": 100}),
    ("rows-lost", FAIL, "train.dropped", {"prompt_too_long": 600}),
    ("same-pairs", FAIL, "train.dropped", {"equal_after_truncation": 600}),
    ("same-pairs", WARN, "train.dropped", {"equal_tokens": 20}),
    ("length-bias", NOTE, "train.findings.length", {"mean_chosen": 40, "mean_rejected": 20, "chosen_is_longer": 0.65}),
    ("length-bias", WARN, "train.findings.length", {"mean_chosen": 40, "mean_rejected": 20, "chosen_is_longer": 0.95}),
]


@pytest.mark.parametrize(("id_", "severity", "place", "value"), DATA)
def test_the_data_raise_their_findings(
    id_: str, severity: Severity, place: str, value: Any, make: Callable[..., Any]
) -> None:
    assert make(name="healthy").finding(id_).severity == OK
    made = make()
    split, *path, last = place.split(".")
    found = getattr(made, split)
    for name in path:
        found = found[name]
    found[last] = value
    assert made.finding(id_).severity == severity


@pytest.mark.parametrize(
    ("replaced", "severity"),
    [({}, None), ({"a_note": 0}, NOTE), ({"a_warn": 0.5, "a_note": 0}, WARN), ({"a_fail": 0.5}, FAIL)],
)
def test_a_value_is_as_bad_as_the_worst_threshold_it_reaches(
    replaced: dict[str, float], severity: Severity | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where --threshold puts them in another order."""
    names = ("a_note", "a_warn", "a_fail")
    monkeypatch.setattr(findings, "THRESHOLDS", {name: findings.Threshold(1.0, "", "") for name in names})
    assert Thresholds(replaced).severity(0.5, names) == severity


def test_a_fail_below_the_warning_is_a_fail(make: Callable[..., Any]) -> None:
    made = make()
    made.train["completions_cut"] = 40  # 2 %, where 5 % is worth a warning
    path = made.write()
    for replaced, severity in (({}, OK), ({"cut_fail": 0.01}, FAIL)):
        (examined,) = examine([path], replaced)
        assert [f.severity for f in examined.diagnosis.findings if f.id == "completions-cut"] == [severity]


def test_a_healthy_run_raises_nothing(make: Callable[..., Any]) -> None:
    diagnosis = make().diagnose()
    assert [f.id for f in diagnosis.findings if f.severity in (FAIL, WARN, NOTE)] == []
    assert diagnosis.verdict.startswith("Nothing looks wrong")


def test_a_cause_hides_what_follows_from_it(make: Callable[..., Any]) -> None:
    """A rate of 0 explains a loss that stays and pairs that are not told apart."""
    still = {"learning_rate": 0.0, "changed_fraction": 0.0, "loss": math.log(2), "rewards/accuracies": 0.0}
    made = make(lambda line: {**per_token(0, 0)(line), **still})
    assert [f.id for f in made.diagnose().findings if f.severity == FAIL] == ["rate-zero"]
    assert made.diagnose().verdict.startswith("Something is wrong: the learning rate is 0")


def test_the_margins_of_the_first_step_stand_in_for_an_evaluation(make: Callable[..., Any]) -> None:
    made = make()
    made.lines = [line for line in made.lines if line["split"] == "train"]
    made.margins = [np.zeros(8), np.ones(8)]
    assert made.finding("reference-mismatch").severity == OK
    made.margins = [np.full(8, 12.0), np.ones(8)]
    found = made.finding("reference-mismatch")
    assert found.severity == FAIL and "margins of step 1" in found.numbers.values()


def test_few_lines_are_no_trend(make: Callable[..., Any]) -> None:
    made = make(per_token(-0.55, -0.6))
    assert made.finding("likelihood-displacement").severity == FAIL
    made.lines = [line for line in made.lines if line["step"] in (0, 50, 100)]
    assert made.finding("likelihood-displacement").severity == NOTE


def test_remedies_are_commands_that_the_command_line_takes(make: Callable[..., Any], tmp_path: Path) -> None:
    """Every key of every remedy is one of the configuration, and its value one that the key takes."""
    seen = set()
    for number, (_, _, change, settings) in enumerate(BROKEN):
        made = make(change, name=f"run{number}")
        made.settings |= settings
        path = made.write()
        method = made.settings["post_training.method"]
        config = load_config(
            overrides={
                "models.0.huggingface_id": "org/model",
                "post_training.method": method,
                "dataset.name": "org/data",
            }
        )
        (path / "config.yaml").write_text(to_yaml(config))
        for finding in examine([path])[0].diagnosis.findings:
            for remedy in finding.remedies:
                command = remedy.command(path)
                if command and command not in seen:
                    seen.add(command)
                    words = shlex.split(command)
                    if words[1] == "replay":  # looks at the run, and has no settings
                        assert words[2:4] == [str(path), "--step"] and int(words[4]) >= 1 and words[5:] == ["--rows"]
                        continue
                    assert words[:2] == ["strop", "train"]
                    options, overrides = parse(parser_of_run("train"), words[2:])
                    load_config(options.config, overrides=overrides)
    assert len(seen) > 15


@pytest.mark.parametrize("train", [0.5, 0.95], ids=["not told apart", "learnt by heart"])
def test_more_is_not_advised_where_pairs_are_learnt_by_heart(train: float, make: Callable[..., Any]) -> None:
    found = make(held(0.51, train)).finding("accuracy-half")
    raised = [r for r in found.remedies if "training.learning_rate" in r.settings]
    assert ("learnt by heart" in found.claim) == (train > 0.9) == (not raised)
    assert found.remedies[0].reads == "pairs"


@pytest.mark.parametrize(("rate", "advised"), [(0.5, 5e-7), (6e-5, 5e-7), (4e-5, 4e-6)])
def test_a_rate_far_above_the_methods_own_gives_way_to_that(
    rate: float, advised: float, make: Callable[..., Any]
) -> None:
    made = make(rising(LN2, 3.0))
    made.settings["training.learning_rate"] = rate
    first = made.finding("rate-high").remedies[0]
    assert first.settings == {"training.learning_rate": advised}
    before = {"training.learning_rate": rate}
    assert first.shown(before) == f"learning_rate {write_value(rate)} → {write_value(advised)}"


def test_each_remedy_has_a_folder_of_its_own(make: Callable[..., Any]) -> None:
    made = make(rising(LN2, 3.0))
    commands = [r.command(made.path, n) for n, r in enumerate(made.finding("rate-high").remedies, start=1)]
    assert len(commands) > 1 and len({shlex.split(command)[-1] for command in commands}) == len(commands)


def test_a_remedy_that_the_run_has_already_is_not_told(make: Callable[..., Any]) -> None:
    made = make(per_token(-0.55, -0.6))
    made.settings["training.num_epochs"] = 1
    words = [r.words for r in made.finding("likelihood-displacement").remedies]
    assert "train fewer steps" not in words and words
    made.settings["training.num_epochs"] = 3
    assert "train fewer steps" in [r.words for r in made.finding("likelihood-displacement").remedies]


def retried(remedy: Any, path: Path) -> Any:
    """The configuration that the command of a remedy trains."""
    options, overrides = parse(parser_of_run("train"), shlex.split(remedy.command(path))[2:])
    return load_config(options.config, overrides=overrides)


GRPO = {"post_training.method": "grpo", "rollout.enabled": True, "rewards": REWARDS}


@pytest.mark.parametrize(
    ("words", "algorithm", "keys"),
    [
        ("divide by a length", "dr_grpo", {}),
        ("count every token", "dapo", {}),
        ("count every token", "dapo", {"post_training.algorithm": "dr_grpo"}),
        ("divide by a length", "dr_grpo", {"post_training.gate": "sapo"}),
        ("count every token", "dapo", {"post_training.gate": "sapo"}),
        ("normalise each reward", "gdpo", {}),
    ],
)
def test_another_algorithm_is_trained_with_its_own_axes(
    words: str, algorithm: str, keys: dict[str, Any], make_sampled: Callable[..., Any]
) -> None:
    """The configuration that a run leaves has a value on every axis, which would win over the algorithm's."""
    path = make_sampled(both(LONG_WRONG, RIGHT_FALLS)).write()
    own = {"models.0.huggingface_id": "org/model", "dataset.name": "org/data", **GRPO, **keys}
    config = load_config(overrides=own)
    (path / "config.yaml").write_text(to_yaml(config))
    found = {r.words: r for f in examine([path])[0].diagnosis.findings for r in f.remedies}
    (remedy,) = (r for text, r in found.items() if text.startswith(words))
    axes = (*ALGORITHMS[algorithm], "normalizer_length")
    fresh = load_config(overrides={**own, "post_training.algorithm": algorithm}).post_training
    again = retried(remedy, path).post_training
    assert [getattr(again, axis) for axis in axes] == [getattr(fresh, axis) for axis in axes]


def test_longer_rows_are_cut_nowhere_earlier(make: Callable[..., Any]) -> None:
    """Each limit stands in the configuration of the run, so one of them alone changes nothing."""
    made = make()
    made.train["completions_cut"] = 800
    path = made.write()
    config = load_config(overrides={"models.0.huggingface_id": "org/model", "dataset.name": "org/data",
                                    "post_training.method": "dpo"})  # fmt: skip
    (path / "config.yaml").write_text(to_yaml(config))
    (cut,) = (f for f in examine([path])[0].diagnosis.findings if f.id == "completions-cut")
    again = retried(cut.remedies[0], path).training
    assert (again.max_seq_length, again.max_prompt_length, again.max_completion_length) == (1024, 512, 512)


def test_fewer_steps_are_fewer_where_their_number_was_asked_for(make: Callable[..., Any]) -> None:
    made = make(per_token(0.1, -0.9))
    made.settings |= {"training.max_steps": 100, "training.num_epochs": 1}
    fewer = [dict(r.settings) for r in made.finding("drift").remedies if r.words == "train fewer steps"]
    assert fewer == [{"training.max_steps": 50}]


@pytest.mark.parametrize("key", ["dataset.val_file", "dataset.splits_dir"])
def test_rows_of_a_validation_file_are_not_held_out(key: str, make: Callable[..., Any]) -> None:
    made = make(lambda line: {"num_groups": 100} if line["split"] == "eval" else {})
    assert made.finding("eval-size").remedies[0].settings
    made.settings[key] = "rows"
    assert not made.finding("eval-size").remedies[0].settings


def test_an_evaluation_of_samples_without_rewards_has_a_loss(make: Callable[..., Any]) -> None:
    """Distillation on what the student samples has none, and its evaluations are none the worse for it."""
    made = make(lambda line: {"loss": 0.5})
    made.settings |= {"post_training.method": "distill", "rollout.enabled": True}
    assert made.finding("not-finite").severity is OK
    made.lines = [{**line, "loss": None} if line["split"] == "eval" else line for line in made.lines]
    assert made.finding("not-finite").severity is FAIL


def test_keys_that_findings_name_are_those_of_the_configuration() -> None:
    sections = "training|rollout|post_training|dataset|lora|finetuning"
    named = set(re.findall(rf"\b(?:{sections})\.[a-z_0-9]+", source_of_checks()))
    known = {key.dotted for key in KEYS}
    assert {name for name in named if name not in known and not name.endswith("_")} == set()


ID = r'(?:Finding|passed|unchecked|graded)\(\s*"([a-z-]+)"'


def source_of_checks() -> str:
    return "".join(
        Path(m.__file__ or "").read_text(encoding="utf-8")
        for m in (accuracy, course, data, pairs, sampled_groups, sampled_rewards, start, unpaired)
    )


def test_every_finding_and_every_threshold_is_explained() -> None:
    """docs/findings.md has each id and each threshold, with its value, and no other."""
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    ids = set(re.findall(ID, source_of_checks()))
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.M)) == ids | {"reference-mismatch"}
    assert set(re.findall(r"^### ([a-z-]+)$", page, re.M)) == ids | {"reference-mismatch"}  # what pages lead to
    listed = dict(re.findall(r"^\| `([a-z]+_[a-z_]+)` \| ([^|]+) \|", page, re.M))
    assert {name: float(value) for name, value in listed.items()} == {
        name: float(f"{t.value:.6g}") for name, t in THRESHOLDS.items()
    }


def test_thresholds_that_nothing_reads_are_not_there() -> None:
    folder = ROOT / "src" / "strop" / "report"
    source = "".join(p.read_text(encoding="utf-8") for p in folder.rglob("*.py") if p.name != "findings.py")
    assert [name for name in THRESHOLDS if f'"{name}"' not in source] == []


def test_a_cause_is_as_bad_as_what_follows_from_it(make: Callable[..., Any]) -> None:
    """A loss that rose and came back, and a policy that went far: the high rate is told, as badly as the drift is."""
    far = make(lambda line: {
        "loss": 4.0 if 10 < line["step"] < 40 and line["split"] == "train" else line["loss"],
        **({} if line["step"] == 0 else {"rewards/chosen": -20.0, "rewards/rejected": -22.0}),
    })  # fmt: skip
    found = far.diagnose()
    assert [f.severity for f in found.findings if f.id == "rate-high"] == [FAIL]
    assert "drift" not in [f.id for f in found.raised]


def test_explained_findings_exist() -> None:
    """What a finding explains is the id of another."""
    source = source_of_checks()
    ids = set(re.findall(ID, source)) | {"reference-mismatch"}
    named = {i for part in re.findall(r"explains=\(([^)]*)\)|FOLLOW_A_HIGH_RATE = \(([^)]*)\)", source) for x in part
             for i in re.findall(r'"([a-z-]+)"', x)}  # fmt: skip
    assert named <= ids


def test_numbers_of_a_run_that_was_read_are_those_of_its_lines(make: Callable[..., Any]) -> None:
    made = make()
    run = read_run(made.write())
    for table, split in ((run.train, "train"), (run.eval, "eval")):
        lines = [line for line in made.lines if line["split"] == split]
        assert table.step.tolist() == [line["step"] for line in lines]
        for name, values in table.columns.items():
            assert values.tolist() == [line[name] for line in lines]


@pytest.mark.parametrize(("noise", "severity"), [(0.5, Severity.OK), (0.001, Severity.FAIL)])
def test_a_rise_that_the_rows_cannot_tell_from_chance_is_none(
    noise: float, severity: Severity, make: Callable[..., Any]
) -> None:
    made = make(lambda line: {"loss": 0.9, "num_groups": 16} if line["split"] == "eval" and line["step"] else {})
    folder = made.write() / "logs" / EVALUATIONS
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for step in (0, 20, 40, 60, 80, 100):
        np.save(folder / row_losses_array(step), 0.7 + 0.01 * (step > 0) + draw.normal(0, noise, 16))
    assert made.finding("worse-than-start").severity is severity


def test_the_change_of_an_evaluation_is_that_of_all_its_rows(make: Callable[..., Any]) -> None:
    """Of a large evaluation, the losses of some rows are kept; their own mean says less than the lines do."""
    made = make(
        lambda line: {"loss": 0.701 if line["step"] else 0.7, "num_groups": 1600} if line["split"] == "eval" else {}
    )
    folder = made.write() / "logs" / EVALUATIONS
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for step in (0, 20, 40, 60, 80, 100):
        np.save(folder / row_losses_array(step), 0.7 + 0.05 * (step > 0) + draw.normal(0, 0.05, 16))
    found = made.finding("worse-than-start")
    assert found.severity is Severity.OK and found.numbers["change, by paired rows"].startswith("+0.001 ")
