"""Online dpo by the real road: pairs of what the policy itself samples, by their rewards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import strop
from sampled_runs import check_resumes, lines, sampling
from strop.errors import ConfigError, TrainingError
from strop.replay.retake import replay

ONLINE = {"method": "dpo", "online": True}


def test_it_trains_on_the_best_and_the_worst(tmp_path: Path, model_dir: Path) -> None:
    (result,) = strop.train(sampling(tmp_path, model_dir, ONLINE, "vowels", **{"training.max_steps": 6}))
    records = lines(result.run_dir / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), (
        "before the first step the policy is the reference"
    )
    assert abs(records[-1]["rewards/margins"]) > 1e-5 and records[0]["time/score"] > 0, "the reference stays behind"
    rollouts = lines(result.run_dir / "rollouts.jsonl")
    for step, record in enumerate(records, start=1):
        rows = [r for r in rollouts if r["step"] == step]
        rewards = [r["rewards"] for r in rows]
        gaps = [max(own) - min(own) for own in rewards]
        for row, own, gap in zip(rows, rewards, gaps, strict=True):
            assert (row["pair"] is None) == (gap == 0)
            if row["pair"] is not None:
                chosen, rejected = row["pair"]
                assert own[chosen] == max(own) and own[rejected] == min(own)
        pairs = [r for r in rows if r["pair"] is not None]
        assert record["num_groups"] == len(pairs)
        assert record["reward"] == pytest.approx(sum(map(sum, rewards)) / (4 * len(rows)))
        assert record["rollout/reward_gap"] == pytest.approx(sum(gaps) / len(pairs))
        assert record["frac_reward_zero_std"] == pytest.approx(1 - len(pairs) / len(rows))
        assert record["rollout/groups_without_signal"] == len(rows) - len(pairs)
        for side, place in (("chosen", 0), ("rejected", 1)):
            tokens = [len(r["completion_ids"][r["pair"][place]]) for r in pairs]
            assert record[f"lengths/{side}"] == pytest.approx(sum(tokens) / len(pairs))
            logps = [sum(r["old_logps"][r["pair"][place]]) for r in pairs]
            assert record[f"logps/{side}"] == pytest.approx(sum(logps) / len(pairs), rel=1e-4), "it trains what it drew"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ({"loss_type": "kto_pair"}, {}),
        pytest.param(
            {"loss_type": "sigmoid", "wpo_weighting": True, "sft_weight": 0.1},
            {"lora.r": 4, "lora.lora_dropout": 0.0},
            marks=pytest.mark.nightly,
        ),
        (
            {"loss_type": "ipo"},
            {"rollout.dynamic_sampling": True, "rollout.temperature": 0.7},
        ),
    ],
    ids=["whole-step", "adapters", "refilled"],
)
def test_how_a_step_is_cut_changes_nothing(
    method: dict[str, Any], keys: dict[str, Any], tmp_path: Path, model_dir: Path
) -> None:
    runs = []
    # adam would make steps of whole size from gradients that are nothing but rounding
    keys = {**keys, "training.optim": "sgd", "training.learning_rate": 0.1, "training.max_steps": 3}
    for name, cut in (("a", {}), ("b", {"training.micro_batch_tokens": 1, "rollout.batch_tokens": 1})):
        folder = tmp_path / name
        folder.mkdir()
        given = sampling(folder, model_dir, {**ONLINE, **method}, "vowels", "odd", **keys, **cut)
        (result,) = strop.train(given)
        runs.append((lines(result.run_dir / "metrics.jsonl"), lines(result.run_dir / "rollouts.jsonl")))
    (records, rollouts), (others, others_rollouts) = runs
    assert [(r["completion_ids"], r["pair"]) for r in rollouts] == [
        (r["completion_ids"], r["pair"]) for r in others_rollouts
    ]
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert [r[name] for r in records] == pytest.approx([r[name] for r in others], rel=1e-3, abs=1e-5)


@pytest.mark.nightly
def test_prompts_without_a_difference_are_dropped(tmp_path: Path, model_dir: Path) -> None:
    """Three of six prompts have rewards that are all 0: no pair is made of them, and every step still has one."""
    (result,) = strop.train(sampling(tmp_path, model_dir, ONLINE, "odd"))
    records = lines(result.run_dir / "metrics.jsonl")
    rows = lines(result.run_dir / "rollouts.jsonl")
    for r in rows:
        assert (r["pair"] is None) == (len(set(r["rewards"])) == 1)
    assert sum(r["rollout/groups_without_signal"] for r in records) == sum(r["pair"] is None for r in rows) > 0
    assert all(1 <= r["num_groups"] <= 3 for r in records)
    again = tmp_path / "refilled"
    again.mkdir()
    keys = {"rollout.dynamic_sampling": True, "rollout.max_refills": 9}
    (result,) = strop.train(sampling(again, model_dir, ONLINE, "odd", **keys))
    refilled = lines(result.run_dir / "metrics.jsonl")
    assert sum(r["num_groups"] for r in refilled) > sum(r["num_groups"] for r in records)


def test_where_no_prompt_has_a_pair_the_run_stops(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(TrainingError, match="no pair can be made: the rewards of all completions of each of 6 prompts"):
        strop.train(sampling(tmp_path, model_dir, ONLINE, "same"))
    assert len(lines(tmp_path / "out" / "run" / "rollouts.jsonl")) == 6, "they can be looked at"


@pytest.mark.nightly
def test_a_run_goes_on_within_a_round(tmp_path: Path, model_dir: Path) -> None:
    keys = {
        "training.save_steps": 1,
        "training.save_total_limit": None,
        "rollout.num_iterations": 2,
        "rollout.steps_per_generation": 2,
    }
    given = sampling(tmp_path, model_dir, ONLINE, "odd", **keys)
    training = given.training.model_copy(update={"save_total_limit": None})
    check_resumes(given.model_copy(update={"training": training}), tmp_path, (2, 3))


@pytest.mark.nightly
def test_a_step_is_taken_again(tmp_path: Path, model_dir: Path) -> None:
    keys = {"training.save_steps": 2, "lora.r": 4}
    (result,) = strop.train(sampling(tmp_path, model_dir, ONLINE, "odd", **keys))
    for step in (2, 3):
        found = replay(result.run_dir, step)
        assert found.first_difference is None and found.start == (2 if step == 3 else 0)


@pytest.mark.nightly
def test_held_out_prompts_are_rewarded_and_the_report_is_whole(tmp_path: Path, model_dir: Path) -> None:
    keys = {"dataset.validation_split": 0.34, "training.eval_steps": 2}
    (result,) = strop.train(sampling(tmp_path, model_dir, ONLINE, "vowels", **keys))
    evaluations = [r for r in lines(result.run_dir / "metrics.jsonl") if r["split"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 2, 4] and all("reward" in r for r in evaluations)
    findings = json.loads((result.run_dir / "findings.json").read_text())
    assert not [f for f in findings["findings"] if f["severity"] == "fail" and f["id"] == "not-finite"]
    found = [f for f in findings["findings"] if f["id"] == "groups-without-signal"]
    assert len(found) == 1
    assert not (result.run_dir / "pairs.json").exists(), "its pairs are in rollouts.jsonl"


@pytest.mark.parametrize(
    ("method", "rewards", "keys", "found"),
    [
        ({"method": "dpo"}, ("odd",), {}, "method dpo trains on those of the rows without online: true"),
        (ONLINE, (), {}, "no reward is given"),
        (ONLINE, ("odd",), {"rollout.num_generations": 1}, "online true compares the completions of a prompt"),
        (ONLINE, ("odd",), {"rollout.enabled": False}, "online is true, and nothing is sampled"),
        ({**ONLINE, "ref_sync_steps": 2}, ("odd",), {}, "a reference that stays as it is"),
        ({"method": "ipo", "online": True}, ("odd",), {}, "method ipo does not read it"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    method: dict[str, Any], rewards: tuple[str, ...], keys: dict[str, Any], found: str, tmp_path: Path, model_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=found):
        sampling(tmp_path, model_dir, method, *rewards, **keys)
