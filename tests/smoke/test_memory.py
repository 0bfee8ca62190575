"""Where memory runs out, the step is taken again in smaller micro-batches; what cannot fit is explained."""

from __future__ import annotations

import json
import logging
import shutil
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import strop
from strop.batch import Batch, TokenScores
from strop.engine import optim
from strop.engine.step_source import Cut, GroupSet
from strop.errors import TrainingError
from strop.machine import Machine
from strop.plan.row_tokens import packed_tokens
from strop.policy.gradient_checkpointing import layers_that_can
from strop.policy.policy import Policy
from strop.types import Completion, Group, Origin

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: RuntimeError(CPU_ERROR),
    MemoryError,
]


def train(
    folder: Path, model_dir: Path, resume: bool = False, **keys: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    folder.mkdir(exist_ok=resume)
    rows = [{"prompt": "hello " * (1 + i % 4), "chosen": "yes " * (1 + i % 5), "rejected": "no"} for i in range(12)]
    if keys.get("post_training.method") == "kto":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = strop.load_config(
        overrides={
            "models": [{"name": "run", "huggingface_id": str(model_dir)}],
            "dataset.train_file": str(folder / "rows.jsonl"),
            "dataset.validation_split": 0.34,
            "post_training.method": "dpo",
            "training.output_dir": str(folder / "out"),
            "training.per_device_train_batch_size": 4,
            "training.per_device_eval_batch_size": 4,
            "training.gradient_accumulation_steps": 1,
            "training.max_steps": 4,
            "training.learning_rate": 1e-3,
            "training.warmup_steps": 0,
            "training.logging_steps": 1,
            **keys,
        }
    )
    (result,) = strop.train(config, resume="auto" if resume else None)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    (weights,) = result.final.glob("*model.safetensors")
    return [json.loads(line) for line in lines], load_file(weights)


def run_out(monkeypatch: pytest.MonkeyPatch, most: int, error: Callable[[], Exception], in_backward: bool) -> list[int]:
    """Batches of more than `most` tokens do not fit: forward, or the backward pass after earlier ones; their sizes."""
    forward, failed = Policy.forward, []

    def fail(*_: Any) -> None:
        raise error()

    def limited(self: Policy, batch: Batch) -> TokenScores:
        out = forward(self, batch)
        if batch.num_tokens > most and (out.logps.requires_grad or not in_backward):
            failed.append(batch.num_tokens)
            if not in_backward:
                fail()
            out.logps.register_hook(fail)
        return out

    monkeypatch.setattr(Policy, "forward", limited)
    return failed


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("loss", "in_backward", "error"),
    [
        pytest.param("sigmoid", True, ERRORS[0], marks=pytest.mark.nightly, id="sigmoid-backward"),
        pytest.param("sigmoid", False, ERRORS[1], id="sigmoid-forward"),
        pytest.param("aot", True, ERRORS[2], id="aot-backward"),
        pytest.param("kto", True, ERRORS[0], id="kto-backward"),
    ],
)
def test_it_is_the_same_run(
    loss: str,
    in_backward: bool,
    error: Callable[[], Exception],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    keys = {"post_training.method": "kto"} if loss == "kto" else {"post_training.loss_type": loss}
    monkeypatch.setattr("strop.plan.micro_batch_size.CPU_TOKENS", 200)
    metrics, weights = train(tmp_path / "enough", model_dir, **keys)
    most = 35 if loss == "kto" else 60
    failed = run_out(monkeypatch, most, error, in_backward)
    again, cut_weights = train(tmp_path / "little", model_dir, **keys)
    said = " ".join(capfd.readouterr().err.split())
    assert failed and "memory ran out" in said and "The result is the same" in said
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in metrics], rel=1e-4, abs=1e-6)
    assert [r["step"] for r in again] == [r["step"] for r in metrics]
    for name, weight in weights.items():
        torch.testing.assert_close(cut_weights[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.nightly), 0.3])
def test_auto_recomputes_everything_before_it_gives_up(
    dropout: float,
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Single groups fit only where activations are computed again: the same steps, told once."""
    keys = {
        "lora.enabled": True,
        "lora.r": 4,
        "lora.lora_dropout": dropout,
        "training.micro_batch_tokens": 1,
        "training.torch_compile": False,
    }
    metrics, weights = train(tmp_path / "enough", model_dir, **keys)
    forward, failed = Policy.forward, []

    def fail(*_: Any) -> None:
        failed.append(True)
        raise ERRORS[0]()

    def limited(self: Policy, batch: Batch) -> TokenScores:
        out = forward(self, batch)
        if out.logps.requires_grad and not all(layer.gradient_checkpointing for layer in layers_that_can(self)):
            out.logps.register_hook(fail)
        return out

    monkeypatch.setattr(Policy, "forward", limited)
    again, same_weights = train(tmp_path / "little", model_dir, **keys)
    said = " ".join(capfd.readouterr().err.split())
    assert len(failed) == 1 and said.count("activations of all layers recomputed") == 1
    assert [r["loss"] for r in again] == [r["loss"] for r in metrics]
    assert all(torch.equal(same_weights[name], weight) for name, weight in weights.items())
    with pytest.raises(TrainingError, match=r"(?s)single groups .*gradient_checkpointing: true"):
        train(tmp_path / "asked", model_dir, **keys, **{"training.gradient_checkpointing": False})


def test_a_group_that_does_not_fit_is_explained(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, 5, ERRORS[0], in_backward=True)
    with pytest.raises(TrainingError) as caught:
        train(tmp_path / "run", model_dir)
    message = str(caught.value)
    assert message.startswith("step 1: memory ran out, although micro-batches are single groups of at most ")
    ways = [
        "bf16: true",
        "lora.enabled",
        "adamw_8bit",
    ]
    assert "gradient_checkpointing" not in message  # auto has tried it
    places = [message.index(way) for way in [*ways, "max_seq_length (now 512)"]]
    assert places == sorted(places) and "batch_size" not in message  # no batch is smaller than one group


def test_memory_that_runs_out_elsewhere_is_explained(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise RuntimeError(CPU_ERROR)

    monkeypatch.setattr(optim.torch.optim.AdamW, "step", no_room)
    with pytest.raises(TrainingError, match=r"run: memory ran out: .*can't allocate memory"):
        train(tmp_path / "run", model_dir)


def test_the_prediction_is_said_before_anything_is_loaded(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise RuntimeError(CPU_ERROR)

    monkeypatch.setattr("strop.session.build_policy", no_room)
    with caplog.at_level(logging.INFO, "strop"), pytest.raises(TrainingError, match="memory ran out"):
        train(tmp_path / "run", model_dir)
    assert "predicted peak memory" in caplog.text


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "most"), [pytest.param("dpo", 60, marks=pytest.mark.nightly), ("kto", 35)])
def test_a_resume_keeps_what_fitted(
    method: str, most: int, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout the cut decides the masks: a resumed run cuts as the unbroken one does from the first step on, the
    mismatched completions of KTO too."""
    drop = {"lora.enabled": True, "lora.lora_dropout": 0.3, "lora.r": 4, "training.save_steps": 2}
    run_out(monkeypatch, most, ERRORS[0], in_backward=True)
    metrics, _ = train(tmp_path / "unbroken", model_dir, **drop, **{"post_training.method": method})
    unbroken = tmp_path / "unbroken" / "out" / "run"
    config = strop.load_config(unbroken / "config.yaml", overrides={"training.output_dir": str(tmp_path / "again")})
    (resumed,) = strop.train(config, resume=str(unbroken / "checkpoint-2"))
    after = [json.loads(line)["loss"] for line in (resumed.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert after == [r["loss"] for r in metrics][-len(after) :]


@pytest.mark.nightly
def test_a_resume_on_a_smaller_machine_cuts_alike(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = {"lora.enabled": True, "lora.lora_dropout": 0.3, "lora.r": 4, "training.save_steps": 2}
    metrics, _ = train(tmp_path / "unbroken", model_dir, **drop)
    unbroken = tmp_path / "unbroken" / "out" / "run"
    monkeypatch.setattr("strop.session.machine_of", lambda device: Machine("cpu", 2**20, None))
    less, _ = train(tmp_path / "small", model_dir, **drop)
    assert [r["loss"] for r in less] != [r["loss"] for r in metrics]  # it would cut finer
    out = tmp_path / "again" / "out"
    shutil.copytree(unbroken, out / "run", ignore=shutil.ignore_patterns("final"))
    rows = str(tmp_path / "unbroken" / "rows.jsonl")
    moved = train(tmp_path / "again", model_dir, resume=True, **drop, **{"dataset.train_file": rows})[0]
    assert [r["loss"] for r in moved] == [r["loss"] for r in metrics]


def test_where_the_mismatched_completions_alone_can_be_cut_they_are() -> None:
    def group(length: int) -> Group:
        ids = array("i", [1] * length)
        return Group(array("i", [1]), (Completion(ids, bytes([1]) * length),), Origin("rows", 1))

    others = GroupSet([group(4), group(4)])
    groups = GroupSet([group(90), group(90)], also={"mismatched": others})
    smaller = Cut(100, packed_tokens).smaller(groups)
    assert smaller is not None and smaller.budget_tokens < 9
    assert smaller.parts(groups) == smaller.parts(others) == [[0], [1]]
    assert smaller.smaller(groups) is None and Cut(100, packed_tokens).smaller(replace(groups, also={})) is None
