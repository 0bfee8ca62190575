"""Distillation from end to end on tiny models: the held-out divergence falls, whatever is cut, resumed or shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from divergences import naive_divergences
from strop.batch import pack, pad
from strop.config import RunConfig
from strop.config.sections import ModelSection
from strop.engine.step import forward_backward
from strop.errors import ConfigError, ModelError
from strop.evaluate.scoring import evaluate
from strop.objectives.base import build_objective
from strop.policy.build import build_policy
from strop.policy.other_models import attach_teacher
from strop.prepared import prepare

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> tuple[Path, Path]:
    """A student and a wider teacher of other weights."""
    made = []
    for name, model in (("student", make_model(seed=1)), ("teacher", make_model(seed=2, hidden_size=64))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        made.append(tmp_path / name)
    return made[0], made[1]


def config_of(folders: tuple[Path, Path], **overrides: Any) -> RunConfig:
    folder = folders[0].parent
    rows = [{"prompt": f"count {i}", "completion": "yes maybe " * (1 + i % 4) + "over"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(folders[0]), "name": "run"}],
            "dataset.train_file": str(folder / "rows.jsonl"),
            "dataset.validation_split": 0.25,
            "post_training": {"method": "distill", "teacher_model_id": str(folders[1])},
            "training.output_dir": str(folder / "out"),
            "training.learning_rate": 3e-3,
            "training.warmup_steps": 0,
            "training.max_steps": 6,
            "training.logging_steps": 1,
            "training.groups_per_step": 4,
            "training.save_steps": 3,
            "training.save_total_limit": None,
            **overrides,
        }
    )


def records_of(config: RunConfig) -> list[dict[str, Any]]:
    path = Path(config.training.output_dir) / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.share(1)
@pytest.mark.parametrize(("beta", "lora"), [(0.0, False), (0.5, True), (1.0, False)])
def test_the_held_out_divergence_falls(beta: float, lora: bool, folders: tuple[Path, Path]) -> None:
    config = config_of(folders, **{"post_training.beta": beta, "lora.enabled": lora, "training.learning_rate": 1e-2})
    strop.train(config)
    first, *_, last = (r for r in records_of(config) if r["split"] == "eval")
    assert 0 < last["divergence"] < 0.95 * first["divergence"]
    assert first["loss"] == pytest.approx(first["divergence"], rel=1e-9)


def test_it_is_the_divergence_of_whole_logits(folders: tuple[Path, Path]) -> None:
    config = config_of(folders, **{"post_training.temperature": 0.8, "post_training.beta": 0.3})
    prepared = prepare(config, config.models[0])
    policy = build_policy(config, config.models[0], CPU)
    attach_teacher(config, config.models[0], policy, prepared.tokenizer)
    assert policy.teacher is not None and policy.share_prefix
    assert not any("teacher" in name for name in policy.trainable()) and policy.teacher.model not in policy.modules()
    groups = list(prepared.data.train)[:3]
    with policy.scoring():
        shared, plain = (policy(made(groups, wants={"divergence"})) for made in (pack, pad))
        batch = pad(groups)
        logits = [
            p.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
            for p in (policy, policy.teacher.model)
        ]
        y, t = (x[batch.scored_positions].double() for x in logits)
    expected = naive_divergences(y / 0.8, t / 0.8, 0.3)
    for found in (shared, plain):
        torch.testing.assert_close(found.columns.find("divergence").double(), expected, rtol=1e-4, atol=1e-5)
        logps = y.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(found.logps.double(), logps, rtol=1e-4, atol=1e-5)


def test_a_step_does_not_depend_on_its_cut(folders: tuple[Path, Path]) -> None:
    config = config_of(folders)
    prepared, objective = prepare(config, config.models[0]), build_objective(config.post_training)
    policy = build_policy(config, config.models[0], CPU)
    attach_teacher(config, config.models[0], policy, prepared.tokenizer)
    groups, found = list(prepared.data.train)[:4], []
    for parts in ([groups], [[g] for g in groups]):
        policy.zero_grad()
        forward_backward(policy, objective, [policy.collate(part, wants={"divergence"}) for part in parts])
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in policy.teacher.model.model.parameters())  # type: ignore[union-attr]


@pytest.mark.nightly
def test_a_resume_goes_on_bit_for_bit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(folders)
    strop.train(config)
    training = config.training.model_copy(update={"output_dir": str(tmp_path / "again")})
    resumed = config.model_copy(update={"training": training})
    strop.train(resumed, resume=str(tmp_path / "out" / "run" / "checkpoint-3"))
    keys = ("step", "loss", "grad_norm", "weights_digest")
    before, after = (
        [[r[k] for k in keys] for r in records_of(c) if r["split"] == "train" and r["step"] > 3]
        for c in (config, resumed)
    )
    assert len(before) == 3 and before == after
    state = json.loads((tmp_path / "out" / "run" / "checkpoint-3" / "MANIFEST.json").read_text(encoding="utf-8"))
    assert "teacher" in json.dumps(state)


@pytest.mark.nightly
def test_eval_compares_students(folders: tuple[Path, Path]) -> None:
    config = config_of(folders)
    found = evaluate(config, [str(folder) for folder in folders])
    student, teacher = (model.numbers["divergence"] for model in found.models)
    assert teacher == pytest.approx(0, abs=1e-6) and student > 0.01


def test_memory_counts_the_teacher(folders: tuple[Path, Path]) -> None:
    config = config_of(folders)
    teacher = build_policy(config, ModelSection(huggingface_id=str(folders[1])), CPU)
    assert prepare(config, config.models[0]).shape().teacher == sum(p.numel() for p in teacher.model.parameters())


def test_without_a_teacher_it_is_refused(folders: tuple[Path, Path]) -> None:
    config = config_of(folders, post_training={"method": "distill"})
    with pytest.raises(ConfigError, match="no teacher"):
        prepare(config, config.models[0])


def test_a_teacher_with_another_vocabulary_is_refused(
    folders: tuple[Path, Path], make_tokenizer: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folders[1])
    config = config_of(folders)
    with pytest.raises(ModelError, match="its tokenizer is not the policy's") as refused:
        prepare(config, config.models[0])
    assert "teacher" in str(refused.value)
