"""`strop replay`: steps of real runs are taken again to the last bit, and what has changed since is told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import strop
from processes import in_processes
from same_runs import in_many
from strop.cli.entry import main
from strop.engine.environment import processes_at
from strop.errors import StropError
from strop.replay.display import lines
from strop.replay.retake import replay

DROPOUT: Mapping[str, Any] = {
    "lora.lora_dropout": 0.3,
    "training.max_steps": 4,
    "training.save_steps": 2,
    "dataset.validation_split": 0.0,
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"post_training.method": "sft"},
    "dpo": {"post_training.loss_type": "sigmoid"},
    "dpo, whole step": {"post_training.loss_type": "kto_pair"},
    "dpo, weighed by the policy": {"post_training.wpo_weighting": True, "post_training.sft_weight": 0.3},
    "dpo, reference follows": {"post_training.ref_sync_steps": 1, "lora.lora_dropout": None},
    "ipo": {"post_training.method": "ipo"},
    "kto": {"post_training.method": "kto"},
    "orpo": {"post_training.method": "orpo", "post_training.orpo_nll": "full"},
    "simpo": {"post_training.method": "simpo"},
    "cpo": {"post_training.method": "cpo"},
    "grpo": {"post_training.method": "grpo", "post_training.beta": 0.1, "training.gradient_accumulation_steps": 1},
}
SHARE = ("kto",)
"""What the suite tries; all of it is nightly."""


def run_of(runs: Any, name: str) -> Path:
    keys = {**DROPOUT, **METHODS[name]}
    if name == "grpo":
        keys["dataset.train_file"] = str(runs.files["groups"])
    return runs({key: value for key, value in keys.items() if value is not None}).path


@pytest.mark.parametrize("name", [n if n in SHARE else pytest.param(n, marks=pytest.mark.nightly) for n in METHODS])
def test_a_step_is_the_same_to_the_last_bit(name: str, runs: Any, group_step: Any) -> None:
    run = run_of(runs, name)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    found = replay(run, 3)
    assert (found.start, [step.step for step in found.steps]) == (2, [3])
    assert found.first_difference is None and found.has_after
    first = replay(run, 2, with_rows=True)  # before the first checkpoint
    assert (first.start, [step.step for step in first.steps]) == (0, [1, 2])
    assert first.first_difference is None
    assert math.isclose(sum(row.share for row in first.rows), 1.0)
    assert [row.hash for row in first.rows] == first.line["rows"]
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.nightly
def test_a_step_that_was_sampled_is_sampled_again(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def vowels(completions): return [1.0 * sum(map(x.count, 'aeiou')) for x in completions]"
    )
    keys = {
        "post_training.method": "grpo",
        "rollout.num_generations": 3,
        "rewards": [f"{tmp_path / 'own.py'}:vowels"],
        "dataset.train_file": str(runs.files["singles"]),
        "training.max_completion_length": 8,
    }
    run = runs({**DROPOUT, **keys}).path
    found = replay(run, 3, with_rows=True)
    assert found.start == 2 and found.first_difference is None
    assert all(len(row.completions) == 3 for row in found.rows)


@pytest.mark.nightly
def test_the_rows_of_a_step_add_up_to_what_was_logged(runs: Any) -> None:
    run = runs({"training.max_steps": 3, "dataset.validation_split": 0.0, "training.save_steps": 1})
    logged = [line for line in run.metrics if line["split"] == "train" and line["step"] == 3]
    found = replay(run.path, 3, with_rows=True)
    rows = found.rows
    margins = [row.margin for row in rows]
    assert math.isclose(0.1 * sum(margins) / len(margins), logged[0]["rewards/margins"], rel_tol=1e-6)
    chosen = [row.completions[0] for row in rows]
    assert math.isclose(sum(c.logp for c in chosen) / len(rows), logged[0]["logps/chosen"], rel_tol=1e-6)
    assert math.isclose(sum(c.reward for c in chosen) / len(rows), logged[0]["rewards/chosen"], rel_tol=1e-5)
    for completion in chosen:
        trained = [logp for logp in completion.logps if logp is not None]
        assert len(completion.tokens) == len(completion.logps)
        assert math.isclose(sum(trained), completion.logp, rel_tol=1e-6)
    pulls = [1 / (1 + math.exp(0.1 * row.margin)) for row in rows]  # sigmoid(-beta margin): the slope of the loss
    weights = [pull * sum(len([x for x in c.logps if x is not None]) for c in row.completions)
               for pull, row in zip(pulls, rows, strict=True)]  # fmt: skip
    for row, weight in zip(rows, weights, strict=True):
        assert math.isclose(row.share, weight / sum(weights), rel_tol=1e-5)


@pytest.mark.nightly
def test_the_rows_of_a_distillation_are_weighed_by_their_divergence(runs: Any) -> None:
    """Its loss is of a column that the policy gives, not of log-probs: each token counts alike."""
    keys = {"post_training.method": "distill", "post_training.teacher_model_id": str(runs.files["other"])}
    run = runs({"training.max_steps": 2, "dataset.validation_split": 0.0, **keys})
    rows = replay(run.path, 2, with_rows=True).rows
    tokens = [sum(x is not None for c in row.completions for x in c.logps) for row in rows]
    assert [row.share for row in rows] == pytest.approx([n / sum(tokens) for n in tokens])


@pytest.mark.nightly
def test_the_scores_of_a_reward_model_are_no_log_probs(runs: Any) -> None:
    run = runs({"training.max_steps": 2, "dataset.validation_split": 0.0, "post_training.method": "reward"})
    found = replay(run.path, 2, with_rows=True)
    (logged,) = [line for line in run.metrics if line["split"] == "train" and line["step"] == 2]
    chosen, rejected = zip(*(row.completions for row in found.rows), strict=True)
    margins = [c.reward - r.reward for c, r in zip(chosen, rejected, strict=True)]
    assert math.isclose(sum(margins) / len(margins), logged["rewards/margins"], rel_tol=1e-5)
    assert all(c.logp is None and set(c.logps) == {None} for c in (*chosen, *rejected))
    told = "".join(f"{line.plain}\n" for line in lines(found))
    assert "chosen: reward " in told and "log-prob" not in told


@pytest.mark.parametrize(("step", "size"), [(1, 2), (4, 2), (5, 3), (8, 3), (9, 1)], ids=lambda number: str(number))
def test_the_number_of_processes_is_that_of_the_step(step: int, size: int, tmp_path: Path) -> None:
    resumes = [{"after_step": 4, "world_size": 3}, {"after_step": 8, "world_size": 1}]
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 2, "resumes": resumes}))
    assert processes_at(tmp_path, step) == size
    assert processes_at(tmp_path / "absent", step) == 1


def _differences(run: Path, step: int) -> tuple[bool, bool, float]:
    """Of a step that is taken again in this world: whether it is the same, whether masks differ, and its shares."""
    found = replay(run, step, with_rows=True)
    return found.first_difference is None, found.masks_differ, sum(row.share for row in found.rows)


@pytest.mark.nightly
def test_as_many_processes_take_a_step_of_several_again(runs: Any) -> None:
    """To the last bit, the masks of dropout included; one process says that its masks are others."""
    run = in_many(2, runs.config({**DROPOUT, "training.groups_per_step": 4, "training.micro_batch_tokens": 64}))
    same, _ = in_processes(2, _differences, run, 3)
    assert same == (True, False, pytest.approx(1.0))
    found = replay(run, 3)
    assert found.masks_differ and found.first_difference is not None
    told = "".join(f"{line.plain}\n" for line in lines(found))
    assert "2 processes took this step, and 1 did now: the masks of lora_dropout are others" in told


@pytest.mark.nightly
def test_the_command_starts_as_many_processes(runs: Any, capfd: Any) -> None:
    run = in_many(2, runs.config({**DROPOUT, "training.groups_per_step": 4, "training.micro_batch_tokens": 64}))
    assert main(["replay", str(run), "--step", "3"]) == 0
    assert capfd.readouterr().out.count("to the last bit") == 1


def test_the_command_says_what_differs(runs: Any, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of(runs, "dpo"), run)
    assert main(["replay", str(run), "--step", "3", "--rows"]) == 0
    told = capsys.readouterr().out
    assert "step 3, taken again from checkpoint-2" in told and "to the last bit" in told
    assert "chosen: log-prob" in told and "of the gradient" in told
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    ledger[2]["loss"] += 1e-12
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    assert main(["replay", str(run), "--step", "4", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["same"] and [step["step"] for step in found["steps"]] == [3, 4]
    assert list(found["steps"][0]["recorded"]) == ["loss"] and found["steps"][1]["recorded"] == {}
    (run / "checkpoint-2" / "state.json").write_text("{}")  # a damaged one is passed over, and stays where it is
    assert replay(run, 3).start == 0 and (run / "checkpoint-2").is_dir()


def test_a_step_from_before_an_extension_says_why_it_differs(runs: Any, tmp_path: Path) -> None:
    """The learning rate falls to the end of the run, which is another one now."""
    keys = {"num_epochs": 5, "max_steps": 2, "save_steps": 1, "output_dir": str(tmp_path)}
    (result,) = strop.train(runs.config(keys))
    strop.train(runs.config({**keys, "max_steps": 4}), resume="auto")
    before, after = (" ".join(map(str, lines(replay(result.run_dir, step)))) for step in (2, 3))
    assert "not the same" in before and "resumed after step 2, and config.yaml is of then" in before
    assert "the same as in the run, to the last bit" in after and "resumed" not in after


def test_what_is_gone_or_another_is_refused_in_words(runs: Any, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of(runs, "dpo"), run)
    for step in ("0", "5"):
        assert main(["replay", str(run), "--step", step]) == 1
        assert "expected: a step from 1 to 4" in capsys.readouterr().err
    config = (run / "config.yaml").read_text()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(runs.files["pairs"].read_text().replace("question 3", "question 33"))
    (run / "config.yaml").write_text(config.replace(str(runs.files["pairs"]), str(rows)))
    with pytest.raises(StropError, match=r"what it was made from has changed:\n +data"):
        replay(run, 3)
    with pytest.raises(StropError, match=r"what it was made from has changed:\n +data"):
        replay(run, 1)
    rows.unlink()
    with pytest.raises(StropError, match=r"rows\.jsonl"):
        replay(run, 3)
    (run / "config.yaml").write_text(config.replace(str(runs.files["model"]), str(runs.files["other"])))
    with pytest.raises(StropError, match="models: the weights that the run started from"):
        replay(run, 3)
    (run / "config.yaml").unlink()
    assert main(["replay", str(run), "--step", "3"]) == 1
    assert "there is no config.yaml" in capsys.readouterr().err


def test_tokens_are_coloured_by_how_likely_they_are(runs: Any) -> None:
    found = replay(run_of(runs, "dpo"), 1, with_rows=True)
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as captured:
        for line in lines(found):
            console.print(line)
    assert "\x1b[31m" in captured.get() or "\x1b[1;31m" in captured.get()  # tokens of a random model are unlikely
