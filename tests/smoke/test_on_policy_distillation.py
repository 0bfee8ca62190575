"""Distillation on what the student samples, by the real road and against an implementation of its own in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import strop
from divergences import naive_divergences
from sampled_runs import check_resumes, lines, sampling
from strop.errors import ConfigError
from strop.replay.retake import replay

WAYS: dict[str, dict[str, Any]] = {
    "forward": {"beta": 0.0},
    "between": {"beta": 0.4, "temperature": 0.8},
    "reverse": {"beta": 1.0},
    "policy_gradient": {"distill_loss": "policy_gradient"},
}


@pytest.fixture
def folders(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> tuple[Path, Path]:
    """A student, and a wider teacher of larger weights, whose distributions are far from even."""
    for name, sizes in {"student": {"seed": 1}, "teacher": {"seed": 2, "hidden_size": 64}}.items():
        model = make_model(**sizes)
        if name == "teacher":
            with torch.no_grad():
                model.lm_head.weight.mul_(3)
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path / "student", tmp_path / "teacher"


def distilling(folders: tuple[Path, Path], way: str, **keys: Any) -> Any:
    method = {"method": "distill", "teacher_model_id": str(folders[1]), **WAYS[way]}
    return sampling(folders[0].parent, folders[0], method, **{"rollout.num_generations": 2, **keys})


@pytest.mark.share(2)
@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_is_that_of_whole_logits(way: str, folders: tuple[Path, Path]) -> None:
    keys = {"training.max_steps": 1, "training.max_grad_norm": None, "rollout.temperature": 0.9}
    (result,) = strop.train(distilling(folders, way, **keys))
    (record,) = (r for r in lines(result.run_dir / "metrics.jsonl") if r["split"] == "train")
    student = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float64)
    losses = []
    for row in lines(result.run_dir / "rollouts.jsonl"):
        for ids in row["completion_ids"]:
            whole, start = torch.tensor([row["prompt_ids"] + ids]), len(row["prompt_ids"]) - 1
            s, t = (model(whole).logits[0, start:-1] / 0.9 for model in (student, teacher))
            if way == "policy_gradient":
                own, other = (x.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0] for x in (s, t.detach()))
                # the gradient of the log-prob, times how much likelier the teacher finds the token
                losses.append((own - own.detach()).exp() * (own.detach() - other))
            else:
                at = WAYS[way].get("temperature", 1.0)
                losses.append(naive_divergences(s / at, t.detach() / at, WAYS[way]["beta"]))
    expected = torch.cat(losses).mean()
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert "reward" not in record and "rewards" not in lines(result.run_dir / "rollouts.jsonl")[0]
    if way == "policy_gradient":
        assert record["reverse_kl"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("way", "length", "asked"),
    [("reverse", 3, (7, 8, 9)), ("policy_gradient", 1, range(6))],
    ids=["reverse, held-out prompts", "policy_gradient, its own prompts"],
)
def test_the_divergence_falls(way: str, length: int, asked: Sequence[int], folders: tuple[Path, Path]) -> None:
    """KL(student || teacher) of the token after prompts, in full."""
    keys = {"training.max_steps": 16, "rollout.num_generations": 32, "training.learning_rate": 1e-2}
    (result,) = strop.train(distilling(folders, way, **{**keys, "training.max_completion_length": length}))
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    prompts = [tokenizer(f"question {i}", return_tensors="pt")["input_ids"] for i in asked]
    teacher, *students = map(AutoModelForCausalLM.from_pretrained, (folders[1], folders[0], result.final))
    before, after = (
        sum(naive_divergences(model(ids).logits[:, -1], teacher(ids).logits[:, -1], 1.0).item() for ids in prompts)
        for model in students
    )
    assert after < 0.95 * before


@pytest.mark.nightly
def test_held_out_prompts_are_sampled_and_compared(folders: tuple[Path, Path]) -> None:
    keys = {"dataset.validation_split": 0.34, "training.eval_steps": 2}
    for way, name in (("reverse", "divergence"), ("policy_gradient", "reverse_kl")):
        (result,) = strop.train(distilling(folders, way, **keys), overwrite=True)
        found = [r for r in lines(result.run_dir / "metrics.jsonl") if r["split"] == "eval"]
        assert [r["step"] for r in found] == [0, 2, 4]
        assert all(r["loss"] == pytest.approx(r[name], rel=1e-6) and r["num_groups"] == 2 for r in found)


@pytest.mark.share(1)
@pytest.mark.parametrize("way", ["between", "policy_gradient"])
def test_how_a_step_is_cut_changes_nothing(way: str, folders: tuple[Path, Path]) -> None:
    runs = []
    for cut in ({}, {"training.micro_batch_tokens": 1, "rollout.batch_tokens": 1}):
        keys = {"training.optim": "sgd", "training.learning_rate": 0.1, "training.max_steps": 2}
        (result,) = strop.train(distilling(folders, way, **keys, **cut), overwrite=True)
        runs.append((lines(result.run_dir / "metrics.jsonl"), lines(result.run_dir / "rollouts.jsonl")))
    assert [r["completion_ids"] for r in runs[0][1]] == [r["completion_ids"] for r in runs[1][1]]
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in runs[0][0]] == pytest.approx([r[name] for r in runs[1][0]], rel=1e-3)


@pytest.mark.nightly
def test_a_run_goes_on_within_a_round_and_is_taken_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Ratios of the second pass are not 1: the student has moved since it sampled."""
    keys = {
        "training.save_steps": 1,
        "rollout.num_iterations": 2,
        "rollout.steps_per_generation": 2,
    }
    given = distilling(folders, "policy_gradient", **keys)
    training = given.training.model_copy(update={"save_total_limit": None})
    given = given.model_copy(update={"training": training})
    check_resumes(given, tmp_path, (3,))
    assert replay(tmp_path / "out" / "run", 2).first_difference is None


@pytest.mark.parametrize(
    ("way", "keys", "found"),
    [
        ("policy_gradient", {"rollout.num_generations": None}, "nothing is sampled"),
        ("reverse", {"rollout.dynamic_sampling": True}, "method distill trains on none"),
        ("policy_gradient", {"post_training.beta": 0.3}, "beta is 0.3, but distill_loss policy_gradient does not read"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    way: str, keys: dict[str, Any], found: str, folders: tuple[Path, Path]
) -> None:
    with pytest.raises(ConfigError, match=found):
        distilling(folders, way, **keys)
