"""Samples while training: they are there, they change nothing, and their score may decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import strop
from strop import session
from strop.dryrun import dry_run
from strop.engine import loop
from strop.errors import ConfigError, StropError
from strop.generate.answers import answer
from strop.generate.loading import Source
from strop.generate.prompts import Prompt
from strop.generate.sampling import Sampling

SCORES = """
def length(prompts, completions):
    return [float(len(text)) for text in completions]

def broken(prompts, completions):
    raise RuntimeError("no")
"""


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.share(1)
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_training_is_the_same_with_samples_and_without(runs: Any, method: str) -> None:
    keys = {"method": method, "r": 2, "lora_dropout": 0.3}
    plain = runs(keys)
    sampled = runs(keys, sample_prompts=3, sample_max_new_tokens=6)
    assert runs.same(plain.final, sampled.final) and plain.untimed == sampled.untimed
    lines = samples(sampled.path)
    assert [(line["step"], line["prompt_number"]) for line in lines] == [(s, i) for s in (0, 2, 4) for i in range(3)]
    assert all(0 < line["tokens"] <= 6 and "score" not in line for line in lines)
    assert not (plain.path / "samples.jsonl").exists()


@pytest.mark.nightly
def test_the_last_samples_are_the_answers_of_the_final_model(runs: Any, tmp_path: Path) -> None:
    """Those that `strop generate` gives, which has transformers decode."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n{"messages": [{"role": "user", "content": "yes no"}]}\n')
    run = runs(sample_prompts=str(prompts), sample_max_new_tokens=8, validation_split=0)
    lines = samples(run.path)
    assert [line["step"] for line in lines] == [0, 0, 4, 4]  # nothing is evaluated
    asked = [Prompt("hello", "1"), Prompt([{"role": "user", "content": "yes no"}], "2")]
    found = answer(Source.of(str(run.path)), asked, Sampling(max_new_tokens=8))
    assert [line["completion"] for line in lines[2:]] == [item.answers[0].text for item in found]
    assert [line["prompt"] for line in lines[2:]] == ["hello", "yes no"]


def test_finetuning_score_gives_a_win_rate_that_may_decide(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(SCORES)
    run = runs(
        sample_prompts=3,
        sample_max_new_tokens=6,
        score_samples=f"{tmp_path}/scores.py:length",
        metric_for_best_model="samples/win_rate",
        load_best_model_at_end=True,
    )
    lines = samples(run.path)
    assert all(line["score"] == len(line["completion"]) for line in lines)
    start = [line["score"] for line in lines if line["step"] == 0]
    for record in run.metrics:
        if record["split"] == "eval":
            own = [line["score"] for line in lines if line["step"] == record["step"]]
            wins = [(a > b) + (a == b) / 2 for a, b in zip(own, start, strict=True)]
            assert record["samples/win_rate"] == sum(wins) / 3 and record["samples/score"] == sum(own) / 3
    rates = {r["step"]: r["samples/win_rate"] for r in run.metrics if r["split"] == "eval"}
    assert rates[0] == 0.5
    result = json.loads((run.path / "result.json").read_text())
    assert result["final_step"] == max((2, 4), key=lambda step: (rates[step], -step))


def test_a_score_that_fails_is_told_once_and_ends_nothing(
    runs: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.py").write_text(SCORES)
    run = runs(sample_prompts=2, sample_max_new_tokens=4, score_samples=f"{tmp_path}/scores.py:broken")
    assert [line["score"] for line in samples(run.path)] == [None] * 6
    assert run.series("samples/win_rate", "eval") == [None] * 3
    assert capfd.readouterr().err.count("an answer has no score: RuntimeError: no") == 1


def _stopped_in_step_4(config: Any, watched: pytest.MonkeyPatch) -> None:
    step = loop.Loop.step

    def dies(self: Any, number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        step(self, number)

    with watched.context() as patch:
        patch.setattr(loop.Loop, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            strop.train(config)


@pytest.mark.nightly
def test_a_resumed_run_has_each_sample_once(runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch) -> None:
    whole = runs(sample_prompts=2, sample_max_new_tokens=4)
    config = runs.config(sample_prompts=2, sample_max_new_tokens=4, output_dir=str(tmp_path), save_steps=1)
    _stopped_in_step_4(config, watched)
    (result,) = strop.train(config, resume="auto")
    assert samples(result.run_dir) == samples(whole.path)


def test_another_number_of_prompts_after_a_resume_takes_no_earlier_samples_away(
    runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    keys = {"sample_max_new_tokens": 4, "output_dir": str(tmp_path), "save_steps": 1, "eval_steps": 2}
    _stopped_in_step_4(runs.config(keys, sample_prompts=2), watched)
    (result,) = strop.train(runs.config(keys, sample_prompts=3), resume="auto")
    of = [(line["step"], line["prompt_number"]) for line in samples(result.run_dir)]
    assert of == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2)]


def test_what_cannot_be_sampled_is_refused(runs: Any) -> None:
    with pytest.raises(ConfigError, match="no validation row"):
        runs(sample_prompts=2, validation_split=0)
    with pytest.raises(ConfigError, match="a number above 0"):
        runs(sample_prompts=0)
    with pytest.raises(ConfigError, match="no samples to score"):
        runs(score_samples="m:f")


@pytest.mark.parametrize("wrong", ["sample_prompts", "score_samples"])
def test_what_cannot_be_sampled_is_refused_before_a_model_is_loaded(
    wrong: str, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **names: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(session, "build_policy", loaded)
    (tmp_path / "prompts.jsonl").write_text('{"question": "no such column"}\n')
    given = {"sample_prompts": str(tmp_path / "prompts.jsonl"), "score_samples": "no_such_module:f"}
    settings = {"sample_prompts": 2, wrong: given[wrong]}
    match = {"sample_prompts": "prompts.jsonl", "score_samples": "no_such_module"}[wrong]
    with pytest.raises(StropError, match=match):
        runs(**settings)
    with pytest.raises(StropError, match=match):
        dry_run(runs.config(**settings), timed=False)
