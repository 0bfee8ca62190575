"""Every method trains: a few steps of a tiny model through the whole road, with finite, falling losses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import strop
from conftest import build_model
from strop import session
from strop.config import METHODS
from strop.errors import DataError
from strop.objectives.base import build_objective
from strop.plan.row_tokens import packed_tokens
from strop.prepared import prepare, with_budget
from strop.run_description import describe

ROWS = 6


def write_rows(path: Path, method: str) -> Path:
    lines = []
    for i in range(ROWS):
        prompt, good, bad = f"count {i}", "yes " * (1 + i % 3), "no dog " * (1 + i % 2)
        match build_objective(METHODS[method]()).rows:
            case "single":
                lines.append({"prompt": prompt, "completion": good})
            case "labelled" if i % 2:
                lines.append({"prompt": prompt, "completion": bad if i % 4 == 1 else good, "label": i % 4 != 1})
            case "group":
                lines.append({"prompt": prompt, "completions": [good, bad, "maybe"], "rewards": [1.0, 0.0, i / ROWS]})
            case _:
                lines.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def train(
    method: str, folder: Path, model_dir: Path, options: dict[str, Any] | None = None, **training: Any
) -> list[dict[str, Any]]:
    config = strop.load_config(
        overrides={
            "models": [{"huggingface_id": str(model_dir)}],
            "dataset.train_file": str(write_rows(folder / "rows.jsonl", method)),
            "dataset.validation_split": 0.34,
            "post_training": {"method": method, **(options or {})},
            "training": {
                "output_dir": str(folder / "out"),
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "num_epochs": 4,
                "logging_steps": 1,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 4,
                **training,
            },
        }
    )
    (result,) = strop.train(config)
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def another_model(folder: Path, model_dir: Path) -> Path:
    """One with the same vocabulary and other weights."""
    shutil.copytree(model_dir, folder / "another")
    build_model(seed=5).save_pretrained(folder / "another")
    return folder / "another"


OF_OTHERS = {"reverse_kl", "entropy"}
"""Metrics of runs that sample while they train, or that ask for an entropy bonus, which these do not."""


@pytest.mark.share(6)
@pytest.mark.parametrize("method", METHODS)
def test_it_trains(method: str, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build_objective(METHODS[method]())
    if not objective.needs_reference and method != "grpo":
        monkeypatch.delattr(session, "reference_policy")  # whoever asks for a reference fails
    options: dict[str, Any] = {}
    if method == "grpo":  # without log-probs of sampling the other losses stay at 0, whatever is learnt
        options = {"algorithm": "cispo", "beta": 0.1}
    elif method == "distill":
        options = {"teacher_model_id": str(another_model(tmp_path, model_dir))}
    records = train(method, tmp_path, model_dir, options)
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert losses[-1] < losses[0]
    for record in records:
        assert {m for m in objective.METRICS if not m.startswith("sampling/")} - OF_OTHERS <= record.keys()


def test_a_reference_that_becomes_the_policy_starts_again_at_ln_2(tmp_path: Path, model_dir: Path) -> None:
    sync = {"ref_sync_steps": 2, "ref_mixup_alpha": 1.0}
    records = train("dpo", tmp_path, model_dir, sync, max_steps=6, eval_steps=1, groups_per_step=2)
    evaluations = {r["step"]: r for r in records if r["split"] == "eval"}
    assert set(evaluations) >= {0, 1, 2, 3, 4}
    for step, record in evaluations.items():
        synced = record["loss"] == pytest.approx(math.log(2), rel=1e-6) and record["rewards/margins"] == 0
        assert synced == (step % 2 == 0), step


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("loss_type", "checkpointing"),
    [
        *(("sigmoid", False), ("kto_pair", True)),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in (("sigmoid", True), ("kto_pair", False))),
    ],
)
def test_a_reference_that_never_moves_is_the_one_scored_before(
    loss_type: str, checkpointing: bool, tmp_path: Path, model_dir: Path
) -> None:
    losses = []
    for name, sync in (("never", {"ref_sync_steps": 10**6}), ("before", {})):
        folder = tmp_path / name
        folder.mkdir()
        options = {"loss_type": loss_type, **sync}
        records = train("dpo", folder, model_dir, options, gradient_checkpointing=checkpointing)
        losses.append([r["loss"] for r in records])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)


@pytest.mark.share(1)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {"wpo_weighting": True}),
        ("dpo", {"wpo_weighting": True, "loss_type": "kto_pair"}),
        ("orpo", {"orpo_nll": "full"}),
    ],
    ids=str,
)
def test_what_is_scored_beside_completions_reaches_the_loss(
    method: str, options: dict[str, Any], tmp_path: Path, model_dir: Path
) -> None:
    with_it, without = tmp_path / "with", tmp_path / "without"
    with_it.mkdir(), without.mkdir()
    rest = {name: value for name, value in options.items() if name == "loss_type"}
    records = [
        [r["loss"] for r in train(method, folder, model_dir, chosen) if r["split"] == "train"]
        for folder, chosen in ((with_it, options), (without, rest))
    ]
    assert records[0][-1] < records[0][0] != records[1][0]


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("kto", {}, r"mismatched completions: about [\d,]+ tokens more per epoch"),
        ("kto", {"kto_loss": "apo_zero_unpaired"}, None),
        ("dpo", {"loss_type": "aot"}, "scored twice"),
        ("dpo", {"ref_sync_steps": 5}, "moves every 5 steps"),
        ("dpo", {}, None),
    ],
    ids=str,
)
def test_what_costs_more_is_said_before(
    method: str, options: dict[str, Any], said: str | None, tmp_path: Path, model_dir: Path
) -> None:
    overrides = {
        "models": [{"huggingface_id": str(model_dir)}],
        "dataset.train_file": str(write_rows(tmp_path / "rows.jsonl", method)),
        "post_training": {"method": method, **options},
        "dataset.validation_split": 0.0,
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 3,
        "training.micro_batch_tokens": 1,
    }
    config = strop.load_config(overrides=overrides)
    prepared = with_budget(prepare(config, config.models[0]), packed_tokens, "cpu")
    lines = list(describe(prepared, packed_tokens))
    costs = [x for x in lines if re.search("mismatched|scored twice|second model", x)]
    assert len(costs) == (said is not None)
    assert said is None or re.search(said, costs[0])


def test_kto_starts_where_policy_and_reference_agree(tmp_path: Path, model_dir: Path) -> None:
    # bit for bit without the store, whose values may come from another cut
    records = train("kto", tmp_path, model_dir, reference_store=False)
    first = next(r for r in records if r["split"] == "eval")
    assert (first["loss"], first["kl"], first["kl_unclamped"], first["rewards/chosen"]) == (0.5, 0.0, 0.0, 0.0)
    assert any(r["kl_unclamped"] != 0 for r in records if r["split"] == "train")


@pytest.mark.nightly
def test_kto_does_not_depend_on_the_batch(tmp_path: Path, model_dir: Path) -> None:
    runs = []
    for batch, accumulation in ((1, 4), (4, 1)):
        folder = tmp_path / str(batch)
        folder.mkdir()
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append([r["loss"] for r in train("kto", folder, model_dir, **sizes) if r["split"] == "train"])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_kto_of_one_row_is_refused(tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "x", "label": True}) + "\n")
    config = {
        "models": [{"huggingface_id": str(model_dir)}],
        "dataset": {"train_file": str(path), "validation_split": 0.0},
        "training.output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(DataError, match="one training row"):
        strop.train(strop.load_config(overrides={**config, "post_training": {"method": "kto"}}))
    unpaired = {"method": "kto", "kto_loss": "apo_zero_unpaired"}
    assert strop.train(strop.load_config(overrides={**config, "post_training": unpaired, "training.max_steps": 1}))


@pytest.mark.parametrize("label", [True, False])
def test_kto_trains_on_one_label(label: bool, tmp_path: Path, model_dir: Path) -> None:
    rows = [{"prompt": f"count {i}", "completion": "yes " * (1 + i % 3), "label": label} for i in range(ROWS)]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "models": [{"huggingface_id": str(model_dir)}],
        "dataset": {"train_file": str(path), "validation_split": 0.34},
        "post_training.method": "kto",
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 3, "logging_steps": 1, "groups_per_step": 2},
    }
    (result,) = strop.train(strop.load_config(overrides=config))
    here, missing = ("chosen", "rejected") if label else ("rejected", "chosen")
    for line in (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert math.isfinite(record["loss"]) and f"rewards/{here}" in record
        assert not any(name.endswith(f"/{missing}") for name in record), "the mean of nothing is no number"


@pytest.mark.nightly
def test_kto_resumes_bit_for_bit(tmp_path: Path, model_dir: Path) -> None:
    """The completions of z0 are a function of seed and epoch: a resume draws the same ones."""
    sizes: dict[str, Any] = {"num_epochs": 3, "save_steps": 1, "save_total_limit": None}
    unbroken = train("kto", tmp_path, model_dir, **sizes)
    (run,) = (tmp_path / "out").iterdir()
    config = strop.load_config(run / "config.yaml")
    resumed = tmp_path / "resumed"
    config = config.model_copy(update={"training": config.training.model_copy(update={"output_dir": str(resumed)})})
    (result,) = strop.train(config, resume=str(run / "checkpoint-2"))
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "kl_unclamped", "grad_norm")
    after = [[r.get(k) for k in keys] for r in unbroken if r["step"] > 2]
    assert after and after == [[r.get(k) for k in keys] for r in records]
