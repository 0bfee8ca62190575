"""Runs that sample: method grpo with rollout and rewards, by the real road."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import strop
from commands import Command
from conftest import build_tokenizer
from same_runs import in_many
from sampled_runs import sampling
from strop.config import RunConfig, load_config, to_yaml
from strop.dryrun import dry_run
from strop.errors import ConfigError, DataError, TrainingError

REWARDS = '''
import math, os, time

def vowels(completions, answer, **_):
    """Some number that depends on the text and on a column of the row."""
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) + 0.01 * a for text, a in zip(completions, answer)]

async def waits(completions):
    return [float(len(text) % 3) for text in completions]

def fails(completions): raise ValueError("no luck")
def nan(completions): return [math.nan if i % 2 else 1.0 for i, _ in enumerate(completions)]
def null(completions): return [None if i % 2 else 1.0 for i, _ in enumerate(completions)]
def hangs(completions): time.sleep(600)
def dies(completions): os._exit(7)
def short(completions): return [1.0]
def talks(completions):
    print("x" * 10_000_000)
    return [1.0 * (i % 2) for i, _ in enumerate(completions)]
def row(completions, chats, messages, more):
    """The number of the row, if all that belongs to it is there."""
    for text, chat, own, column in zip(completions, chats, messages, more, strict=True):
        asked = {"role": "user", "content": f"n {column['i'][0]}"}
        assert own[0] == asked and chat == [asked, {"role": "assistant", "content": text}]
    return [column["i"][0] for column in more]
def once(prompts, completions):
    """Fails for one of the prompts."""
    if "question 3" in prompts[0]:
        raise ValueError("not this one")
    return [float(len(text)) for text in completions]
'''


def config(folder: Path, model_dir: Path, *rewards: Any, **keys: Any) -> RunConfig:
    return sampling(folder, model_dir, {"method": "grpo"}, *(rewards or ["vowels"]), functions=REWARDS, **keys)


def lines(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_samples_rewards_trains_and_writes_down(tmp_path: Path, model_dir: Path) -> None:
    own = f"{tmp_path / 'own.py'}:waits"
    rewards = ("vowels", {"name": own, "weight": 0.5}, {"name": "length", "settings": {"max_length": 8, "cache": 4}})
    (result,) = strop.train(config(tmp_path, model_dir, *rewards))
    records = lines(result.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for record in records:
        assert record["clip_ratio/region_mean"] == 0 and record["rewards/failed"] == 0
        assert record["time/sample"] > 0 and record["time/reward"] > 0 and record["num_groups"] == 3
        means = [record[f"rewards/{name}/mean"] for name in (f"{tmp_path / 'own.py'}:vowels", own, "length")]
        assert record["reward"] == pytest.approx(means[0] + 0.5 * means[1] + means[2])
    rollouts = lines(result.run_dir / "rollouts.jsonl")
    assert [r["step"] for r in rollouts] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert {r["where"] for r in rollouts[:6]} == {r["where"] for r in rollouts[6:]}, "an epoch meets every prompt"
    for row in rollouts:
        assert len(row["completion_ids"]) == len(row["rewards"]) == len(row["old_logps"]) == 4
        assert [len(x) for x in row["completion_ids"]] == [len(x) for x in row["old_logps"]]
        rewards = torch.tensor(row["rewards"], dtype=torch.float64)
        assert row["advantages"] == pytest.approx(((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist())
        assert row["rewards"] == pytest.approx(
            [
                sum(x)
                for x in zip(
                    *[
                        [w * v for v in values]
                        for w, values in zip((1, 0.5, 1), row["rewards_by_name"].values(), strict=True)
                    ],
                    strict=True,
                )
            ]
        )


@pytest.mark.share(1)
@pytest.mark.parametrize(
    "keys",
    [
        {"post_training.beta": 0.5},
        {"post_training.beta": 0.5, "lora.r": 4},
        {"post_training.beta": 0.5, "post_training.algorithm": "rloo"},
        {"post_training.beta": 0.5, "post_training.ref_model_id": "other"},
    ],
    ids=str,
)
def test_the_policy_is_held_to_its_reference(keys: dict[str, Any], tmp_path: Path, model_dir: Path) -> None:
    if "post_training.ref_model_id" in keys:
        keys = {**keys, "post_training.ref_model_id": str(shutil.copytree(model_dir, tmp_path / "other"))}
    (result,) = strop.train(config(tmp_path, model_dir, **keys))
    first, *_, last = lines(result.run_dir / "metrics.jsonl")
    assert first["time/score"] > 0
    if keys.get("post_training.algorithm") != "rloo":
        assert first["loss/kl"] == pytest.approx(0, abs=1e-6)
        assert last["kl"] > 1e-6 and last["loss/kl"] == pytest.approx(0.5 * last["kl"], rel=1)


def test_what_samples_is_compared_with_what_trains(tmp_path: Path, model_dir: Path) -> None:
    """The same weights and precision: the ratio is 1 but for rounding, before any correction."""
    (result,) = strop.train(config(tmp_path, model_dir, **{"post_training.sampler_correction": "token_truncate"}))
    for record in lines(result.run_dir / "metrics.jsonl"):
        assert 0 < record["sampling/sampling_logp_difference/mean"] < 1e-5
        assert record["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    row = lines(result.run_dir / "rollouts.jsonl")[0]
    assert row["sampler_logps"] != row["old_logps"]


@pytest.mark.nightly
def test_held_out_prompts_decide_which_model_is_best(tmp_path: Path, model_dir: Path) -> None:
    keys = {
        "dataset.validation_split": 0.34,
        "training.eval_steps": 1,
        "training.max_steps": 5,
        "finetuning.early_stopping_patience": 2,
    }
    (result,) = strop.train(config(tmp_path, model_dir, "vowels", **keys))
    found = lines(result.run_dir / "metrics.jsonl")
    evaluations = [r for r in found if r["split"] == "eval"]
    assert evaluations[0]["step"] == 0 and evaluations[0]["num_groups"] == 2
    for record in evaluations:
        assert record["reward_low"] <= record["reward"] <= record["reward_high"] and "loss" not in record
        assert record[f"rewards/{tmp_path / 'own.py'}:vowels/mean"] == pytest.approx(record["reward"])
    best = max(evaluations[1:], key=lambda r: (r["reward"], -r["step"]))
    assert json.loads((result.run_dir / "result.json").read_text())["final_step"] == best["step"]
    trained_on = {r["where"] for r in lines(result.run_dir / "rollouts.jsonl")}
    assert len(trained_on) == 4, "held-out prompts are not trained on"
    findings = json.loads((result.run_dir / "findings.json").read_text())
    assert not [f for f in findings["findings"] if f["id"] == "not-finite" and f["severity"] == "fail"]
    with pytest.raises(ConfigError, match="no evaluation has a metric 'loss'"):
        strop.train(
            config(tmp_path, model_dir, **keys, **{"finetuning.metric_for_best_model": "eval_loss"}), overwrite=True
        )


def test_a_model_is_a_reward_beside_functions(tmp_path: Path, model_dir: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(model_dir, judge, ignore=shutil.ignore_patterns("model*"))
    torch.manual_seed(0)
    settings = LlamaConfig.from_pretrained(model_dir, num_labels=1)
    LlamaForSequenceClassification(settings).save_pretrained(judge)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(judge)
    name = f"model:{judge}"
    (result,) = strop.train(config(tmp_path, model_dir, "vowels", name, **{"training.max_steps": 1}))
    (record,) = lines(result.run_dir / "metrics.jsonl")
    row = lines(result.run_dir / "rollouts.jsonl")[0]
    assert len(set(row["rewards_by_name"][name])) > 1 and record["rewards/failed"] == 0
    expected = record[f"rewards/{name}/mean"] + record[f"rewards/{tmp_path / 'own.py'}:vowels/mean"]
    assert record["reward"] == pytest.approx(expected)


def test_rewards_get_the_row_and_the_conversation(tmp_path: Path, model_dir: Path) -> None:
    """Whatever a row holds comes to its own completions, from every source, and nothing of it is read twice."""
    rows = [
        {"messages": [{"role": "user", "content": f"n {i}"}, {"role": "assistant", "content": "y"}], "more": {"i": [i]}}
        for i in range(6)
    ]
    given = config(tmp_path, model_dir, "row", **{"training.max_steps": 2, "dataset.template": "chatml"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = strop.train(given)
    found = lines(result.run_dir / "rollouts.jsonl")
    assert sorted(int(r["where"].rpartition(":")[2]) for r in found) == [1, 2, 3, 4, 5, 6]
    for r in found:
        assert set(r["rewards"]) == {float(r["where"].rpartition(":")[2]) - 1}


def test_what_was_sampled_trains_again_from_its_file(tmp_path: Path, model_dir: Path) -> None:
    (result,) = strop.train(config(tmp_path, model_dir, **{"training.max_steps": 1}))
    (tmp_path / "again").mkdir()
    keys = {
        "models": [{"huggingface_id": str(model_dir), "name": "again"}],
        "dataset": {"train_file": str(result.run_dir / "rollouts.jsonl"), "validation_split": 0.0},
        "post_training.method": "grpo",
        "training.output_dir": str(tmp_path / "again"),
        "training.groups_per_step": 3,
        "training.max_steps": 1,
        "training.learning_rate": 1e-2,
        "training.warmup_steps": 0,
    }
    (again,) = strop.train(load_config(overrides=keys))
    first, second = (lines(r.run_dir / "metrics.jsonl")[0] for r in (result, again))
    for name in ("loss", "grad_norm", "reward", "reward_std", "completions/mean_length"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name


@pytest.mark.nightly
@pytest.mark.parametrize("changes", [{"training.micro_batch_tokens": 1}, {"rollout.batch_tokens": 1}], ids=str)
def test_how_a_step_is_cut_or_decoded_changes_nothing(changes: dict[str, Any], tmp_path: Path, model_dir: Path) -> None:
    runs = []
    for name, keys in (("a", {}), ("b", changes)):
        folder = tmp_path / name
        folder.mkdir()
        (result,) = strop.train(config(folder, model_dir, **keys))
        runs.append(lines(result.run_dir / "rollouts.jsonl"))
    assert [r["completion_ids"] for r in runs[0]] == [r["completion_ids"] for r in runs[1]]


def test_rows_train_at_the_temperature_that_they_were_sampled_at(tmp_path: Path, model_dir: Path) -> None:
    keys = {"rollout.temperature": 0.25, "training.max_steps": 1}
    (sampled,) = strop.train(config(tmp_path, model_dir, **keys))
    file = {
        "dataset.train_file": str(sampled.run_dir / "rollouts.jsonl"),
        "training.output_dir": str(tmp_path / "more"),
    }
    (again,) = strop.train(
        load_config(
            overrides={
                "models": [{"huggingface_id": str(model_dir), "name": "run"}],
                "post_training.method": "grpo",
                "training.groups_per_step": 3,
                "training.max_seq_length": 64,
                "training.max_steps": 1,
                "dataset.validation_split": 0.0,
                **file,
            }
        )
    )
    (record,) = lines(again.run_dir / "metrics.jsonl")
    assert "temperature: 0.25" in (again.run_dir / "config.yaml").read_text()
    assert record["clip_ratio/region_mean"] == 0 and abs(record["loss"]) < 1e-6, "the policy is that which sampled"


@pytest.mark.nightly
def test_two_processes_sample_what_one_samples(tmp_path: Path, model_dir: Path) -> None:
    """Rounding apart, by which gradients are summed in another order: two steps do not show it."""
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        given = config(folder, model_dir, "vowels", **{"training.max_steps": 2})
        path = strop.train(given)[0].run_dir if size == 1 else in_many(size, given)
        found.append(
            [(row["step"], row["prompt_number"], row["completion_ids"]) for row in lines(path / "rollouts.jsonl")]
        )
    assert found[0] == found[1] and {step for step, *_ in found[0]} == {1, 2}


@pytest.mark.nightly
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, model_dir: Path) -> None:
    """Killed in the middle, resumed: the same completions, rewards and weights as a run that nobody killed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    keys = {"training.max_steps": 6, "training.save_steps": 2, "finetuning.load_best_model_at_end": False}
    for folder in (whole, broken):
        folder.mkdir()
        text = to_yaml(config(folder, model_dir, **keys, **{"finetuning.early_stopping_patience": None}))
        (folder / "config.yaml").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(folder: Path, *flags: str) -> Command:
        return Command(["train", "--config", str(folder / "config.yaml"), *flags], folder / "said", environment)

    assert start(whole).wait() == 0
    process = start(broken)
    log = broken / "out" / "run" / "rollouts.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in its third step"
    assert start(broken, "--resume").wait() == 0

    def rollouts(folder: Path) -> list[dict[str, Any]]:
        own = lines(folder / "out" / "run" / "rollouts.jsonl")
        return [{name: x for name, x in r.items() if name not in ("where", "rewards_by_name")} for r in own]

    assert rollouts(broken) == rollouts(whole)
    weights = [(folder / "out" / "run" / "final" / "model.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]


@pytest.mark.nightly
def test_a_run_goes_on_within_a_round(tmp_path: Path, model_dir: Path) -> None:
    """What was sampled before the checkpoint is trained on after it, bit for bit: old log-probs, reference and all."""
    keys = {
        "training.max_steps": 8,
        "training.save_steps": 1,
        "training.save_total_limit": None,
        "rollout.num_iterations": 2,
        "rollout.steps_per_generation": 2,
        "rollout.dynamic_sampling": True,
        "post_training.beta": 0.1,
    }
    given = config(tmp_path, model_dir, "vowels", **keys)
    (whole,) = strop.train(given)
    records = lines(whole.run_dir / "metrics.jsonl")
    assert [r["kl"] > 1e-9 for r in records] == [False, *[True] * 7], "every step moves the weights"
    assert [r["time/sample"] > 0 for r in records] == [True, False, False, False] * 2
    kept = shutil.copytree(whole.run_dir, tmp_path / "kept")
    for step in (3, 6):
        shutil.rmtree(whole.run_dir)
        shutil.copytree(kept, whole.run_dir)
        for later in range(step + 1, 9):
            shutil.rmtree(whole.run_dir / f"checkpoint-{later}")
        shutil.rmtree(whole.run_dir / "final")
        (again,) = strop.train(given, resume="auto")
        for name in ("rollouts.jsonl", "final/model.safetensors"):
            assert (again.run_dir / name).read_bytes() == (kept / name).read_bytes(), f"{name}, resumed after {step}"
        digests = [[r["weights_digest"] for r in lines(f / "metrics.jsonl")] for f in (kept, again.run_dir)]
        assert digests[0] == digests[1]


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ("fails", "ValueError: no luck"),
        ("nan", "no finite number for 2 of 4 completions"),
        ("null", "no finite number for 2 of 4 completions"),
        ("hangs", "more than 0.5 seconds"),
        ("dies", r"its process ended \(exit code 7\)"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_names_the_row(
    reward: str, found: str, tmp_path: Path, model_dir: Path
) -> None:
    with pytest.raises(TrainingError, match=found) as stopped:
        strop.train(config(tmp_path, model_dir, reward, **{"rollout.reward_timeout": 0.5}))
    assert "rows.jsonl:" in str(stopped.value)


@pytest.mark.nightly
@pytest.mark.parametrize("reward", ["fails", "hangs", "dies"])
def test_a_value_stands_in_for_a_reward_that_fails(reward: str, tmp_path: Path, model_dir: Path) -> None:
    keys = {"rollout.on_reward_error": "value", "rollout.reward_error_value": -1.0, "rollout.reward_timeout": 0.5}
    (result,) = strop.train(config(tmp_path, model_dir, reward, "talks", **keys, **{"training.max_steps": 1}))
    (record,) = lines(result.run_dir / "metrics.jsonl")
    assert record["rewards/failed"] == 12
    assert record["reward"] == pytest.approx(-1 + 0.5) and record["frac_reward_zero_std"] == 0


def test_a_group_whose_reward_fails_is_left_out(tmp_path: Path, model_dir: Path) -> None:
    keys = {"rollout.on_reward_error": "skip_group", "training.max_steps": 2}
    (result,) = strop.train(config(tmp_path, model_dir, "once", **keys))
    records = lines(result.run_dir / "metrics.jsonl")
    assert sorted(r["num_groups"] for r in records) == [2, 3] and sum(r["rewards/failed"] for r in records) == 4
    assert not any("question 3" in r["prompt"] for r in lines(result.run_dir / "rollouts.jsonl"))
    with pytest.raises(TrainingError, match="no prompt of this step has rewards"):
        other = tmp_path / "other"
        other.mkdir()
        strop.train(config(other, model_dir, "fails", **{"rollout.on_reward_error": "skip_group"}))


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ("short", "1 values for 4 completions"),
        ("missing", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("exact_macht", "exact_macht: there is no reward of this name"),
        ({"name": "exact_match", "settings": {"column": "solution"}}, "no column 'solution'"),
        ({"name": "length"}, "missing a required argument: 'max_length'"),
        ({"name": "python_tests", "settings": {"column": "answer"}}, "runs code that the model wrote, and that is off"),
    ],
    ids=str,
)
def test_a_reward_that_cannot_be_one_is_refused(reward: Any, found: str, tmp_path: Path, model_dir: Path) -> None:
    if reward == "exact_macht":
        reward = {"name": reward}
    with pytest.raises(ConfigError, match=found) as refused:
        strop.train(config(tmp_path, model_dir, reward))
    if reward != "short":  # a function of one's own is not called without completions
        with pytest.raises(ConfigError) as in_dry_run:
            dry_run(config(tmp_path, model_dir, reward), timed=False)
        assert str(in_dry_run.value) == str(refused.value)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"post_training.method": "dpo"}, "completions are to be sampled, and method dpo"),
        ({"rewards": []}, "no reward is given"),
        ({"rollout.num_generations": 1}, "num_generations is 1"),
        (
            {"post_training.sampler_correction": "token_mask", "rollout.top_p": 0.9},
            r"with rollout\.top_p the sampler draws from a part",
        ),
        ({"rollout.num_generations_eval": 2}, "at temperature_eval 0 all are the same"),
        ({"rollout.max_refills": 5}, "without dynamic_sampling nothing reads it"),
        (
            {"post_training.advantage": "none", "rollout.dynamic_sampling": True, "rollout.num_generations": 1},
            "num_generations is 1: that would be every prompt",
        ),
        ({"rollout.enabled": False}, "nothing is sampled that they could reward"),
        ({"rollout.reward_error_value": 1.0}, "on_reward_error stop does not read it"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    keys: dict[str, Any], found: str, tmp_path: Path, model_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=found):
        config(tmp_path, model_dir, **keys)


def test_a_prompt_without_room_is_refused(tmp_path: Path, model_dir: Path) -> None:
    keys = {"training.max_seq_length": 6, "training.max_prompt_length": 5, "training.max_completion_length": None}
    loaded = config(tmp_path, model_dir, **keys)
    assert loaded.training.max_completion_length is None
    with pytest.raises(DataError, match=r"which leaves 0 for a completion|rows are dropped"):
        strop.train(config(tmp_path, model_dir, **{**keys, "training.max_prompt_length": None}))


def test_the_configuration_comes_back(tmp_path: Path, model_dir: Path) -> None:
    given = config(tmp_path, model_dir, "vowels", {"name": "regex", "weight": 2.0, "settings": {"pattern": "a+"}})
    (tmp_path / "again.yaml").write_text(to_yaml(given))
    assert load_config(tmp_path / "again.yaml") == given


@pytest.mark.nightly
def test_a_forecast_changes_no_step_and_is_made_once(
    tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str, probed: int) -> RunConfig:
        more = {"rollout.probe_prompts": probed, "training.save_steps": 2, "training.max_steps": 4}
        return config(tmp_path, model_dir, "waits", **more, **{"training.output_dir": str(tmp_path / name)})

    with caplog.at_level("INFO", logger="strop"):
        (probed,) = strop.train(made("probed", 5))
    (plain,) = strop.train(made("plain", 0))
    assert not (plain.run_dir / "forecast.json").exists()
    for name in ("rollouts.jsonl", "final/model.safetensors"):
        assert (probed.run_dir / name).read_bytes() == (plain.run_dir / name).read_bytes()
    said = [r.getMessage() for r in caplog.records if "forecast from 5 prompts" in r.getMessage()]
    found = json.loads((probed.run_dir / "forecast.json").read_text())
    assert len(said) == 1 and found["num_prompts"] == 5 and found["num_generations"] == 4
    assert 0 <= found["low"] <= found["without_signal"] <= found["high"] <= 1
    findings = (probed.run_dir / "findings.json").read_text()
    assert f"at the start, {found['without_signal']:.0%} were forecast" in findings

    def never(*_: Any) -> None:
        raise AssertionError("a resumed run forecasts nothing")

    before = (probed.run_dir / "forecast.json").read_bytes()
    shutil.rmtree(probed.run_dir / "final")
    shutil.rmtree(probed.run_dir / "checkpoint-4")
    monkeypatch.setattr("strop.rollout.forecast.Probe.run", never)
    (again,) = strop.train(made("probed", 5), resume="auto")
    assert (again.run_dir / "forecast.json").read_bytes() == before
    assert (again.run_dir / "rollouts.jsonl").read_bytes() == (plain.run_dir / "rollouts.jsonl").read_bytes()


def test_a_forecast_needs_rewards_to_compare(tmp_path: Path, model_dir: Path) -> None:
    alone = {"rollout.num_generations": 1, "post_training.advantage": "none", "rollout.probe_prompts": 4}
    with pytest.raises(ConfigError, match="compared with no other"):
        config(tmp_path, model_dir, **alone)


def test_gdpo_normalises_every_reward_and_its_rollouts_train_again(tmp_path: Path, model_dir: Path) -> None:
    own, how = f"{tmp_path / 'own.py'}:waits", {"post_training.algorithm": "gdpo", "training.max_steps": 1}
    rewards, weights = ("vowels", {"name": own, "weight": 0.25}), np.array([1.0, 0.25])
    (result,) = strop.train(config(tmp_path, model_dir, *rewards, **how))
    rows, (record,) = lines(result.run_dir / "rollouts.jsonl"), lines(result.run_dir / "metrics.jsonl")
    for row in rows:
        each = np.array([*row["rewards_by_name"].values()])
        apart = (each - each.mean(1, keepdims=True)) / (each.std(1, ddof=1, keepdims=True) + 1e-4)
        assert row["normalised_rewards"] == pytest.approx(weights @ apart, abs=1e-12)
        assert row["rewards"] == pytest.approx(weights @ each)
    whitened = np.concatenate([row["normalised_rewards"] for row in rows])
    whitened = (whitened - whitened.mean()) / (whitened.std(ddof=1) + 1e-4)
    # fresh samples: the ratio is 1, and the loss minus the mean advantage
    assert record["loss"] == pytest.approx(-whitened.mean(), abs=1e-6)
    again = {
        **how,
        "rollout.enabled": False,
        "rewards": [],
        "dataset.validation_split": 0.0,
        "dataset.train_file": str(result.run_dir / "rollouts.jsonl"),
        "training.output_dir": str(tmp_path / "again"),
    }
    (offline,) = strop.train(config(tmp_path, model_dir, **again))
    (repeated,) = lines(offline.run_dir / "metrics.jsonl")
    assert repeated["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-5)


def test_gdpo_samples_in_place_of_groups_whose_rewards_cancel(tmp_path: Path, model_dir: Path) -> None:
    """A group has a signal by what is compared: rewards that differ and have one sum teach; equal ones do not."""
    (tmp_path / "more.py").write_text("def up(completions): return [0.0, 1.0, 0.0, 1.0]\n"
                                      "def down(completions): return [3.0, 2.0, 3.0, 2.0]\n")  # fmt: skip
    up, down = ({"name": f"{tmp_path / 'more.py'}:{name}"} for name in ("up", "down"))
    for weight, share in ((1.0, 1.0), (0.5, 0.0)):
        keys = {
            "post_training.algorithm": "gdpo",
            "training.max_steps": 1,
            "training.output_dir": str(tmp_path / str(share)),
        }
        (result,) = strop.train(config(tmp_path, model_dir, up, {**down, "weight": weight}, **keys))
        (record,) = lines(result.run_dir / "metrics.jsonl")
        assert record["frac_reward_zero_std"] == share and record["num_zero_signal_groups"] == 3 * share


@pytest.mark.parametrize("keys", [{"post_training.kl_in": "reward", "post_training.beta": 0.1}], ids=str)
def test_gdpo_takes_no_divergence_off_the_reward(keys: dict[str, Any], tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="normalises each reward by itself"):
        config(tmp_path, model_dir, **{"post_training.algorithm": "gdpo", **keys})
