"""Groups of any number of completions on the whole road: file, table, plan, report, estimate, step."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from strop.batch import Scores
from strop.columns import Unit, groups
from strop.config import RunConfig, load_config, resolve
from strop.config.methods import MethodSettings
from strop.data.read.row import RowRefused
from strop.data.shapes.examples import RowColumns, to_example
from strop.data.text.show import show_group
from strop.engine.step import forward_backward
from strop.estimate import estimate, fitted, planned_precision
from strop.machine import Machine
from strop.objectives.base import Mean, Objective
from strop.plan.cutting import cut
from strop.plan.row_tokens import packed_tokens, padded_tokens
from strop.policy.build import build_policy
from strop.prepared import Prepared, prepare
from strop.run_description import describe
from strop.types import Origin, RowShape

CPU = Machine("cpu", 2**34, None)
COUNTS = (1, 3, 8)
"""Completions of the groups."""


class PlainSettings(MethodSettings):
    OBJECTIVE: ClassVar[str] = "of_this_test:Plain"
    ROWS: ClassVar[RowShape] = "group"

    method: Literal["plain"] = "plain"


class Plain(Objective[PlainSettings]):
    """Completion n of a group counts n times as much as the first, in the mean over the step's groups."""

    METRICS: ClassVar[Mapping[str, str]] = {"answers": "completions of a group"}

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"likelihood": groups}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        group_of = scores.group_index
        place = torch.arange(len(group_of)) - torch.searchsorted(group_of, group_of)
        return {"likelihood": -(scores.sums(scores.logps) * (1 + place)).sum()}

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        return {"answers": (float(scores.structure.num_completions), scores.structure.num_groups)}


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    module = ModuleType("strop.objectives.of_this_test")
    vars(module)["Plain"] = Plain
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rows = [
        {"prompt": f"question {i}", "completions": ["yes " * (1 + (i + n) % 4) + f"{n}" for n in range(count)]}
        for i, count in enumerate(COUNTS * 4)
    ]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "models.0.huggingface_id": str(model_dir),
        "dataset.train_file": str(tmp_path / "groups.jsonl"),
        "dataset.validation_split": 0.25,
        "method": "sft",
        "per_device_train_batch_size": 3,
        "r": 4,
        "lora_dropout": 0.0,
    }
    config = resolve(load_config(overrides=keys))
    return config.model_copy(update={"post_training": PlainSettings()})


@pytest.fixture
def prepared(config: RunConfig) -> Prepared:
    return prepare(config, config.models[0])


def test_the_file_comes_back_whole(prepared: Prepared) -> None:
    groups = [*prepared.data.train, *prepared.data.eval]
    assert sorted(len(group.completions) for group in groups) == sorted(COUNTS * 4)
    for group in groups:
        own = [prepared.tokenizer.decode(c.ids, skip_special_tokens=True).split() for c in group.completions]
        assert [words[-1] for words in own] == [str(n) for n in range(len(own))], "in the order of the file"
    text = show_group(next(g for g in groups if len(g.completions) == 3), prepared.tokenizer, rows="group")
    assert "completion 3 (" in text and "chosen" not in text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "missing_field"),
        ({"completions": ["x"]}, "missing_field"),
        ({"prompt": "q", "completions": None}, "null_field"),
        ({"prompt": "q", "completions": []}, "wrong_type"),
        ({"prompt": "q", "completions": "x"}, "wrong_type"),
        ({"prompt": "q", "completions": {"a": "x"}}, "wrong_type"),
        ({"prompt": "q", "completions": ["x", 3]}, "wrong_type"),
        ({"prompt": "q", "completions": ["x", " "]}, "empty_field"),
    ],
)
def test_what_is_no_group_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRefused) as refused:
        to_example(row, Origin("rows", 1), "group", RowColumns())
    assert refused.value.reason == reason


def test_texts_messages_and_json_are_one() -> None:
    """And two completions may be the same: nothing compares them."""
    turns = [[{"role": "assistant", "content": words}] for words in ("x", "x")]
    prompt = [{"role": "user", "content": "q"}]
    found = [
        to_example({"prompt": prompt, "completions": completions}, Origin("rows", 1), "group", RowColumns())
        for completions in (["x", "x"], turns, json.dumps(turns))
    ]
    assert found[0] == found[1] == found[2] and len(found[0].completions) == 2


def test_the_report_counts_every_completion(prepared: Prepared) -> None:
    train, held = (prepared.data.report.statistics[name] for name in ("train", "eval"))
    assert train["num_completions"] + held["num_completions"] == 4 * sum(COUNTS)
    plain = sum(len(g.prompt_ids) + len(c.ids) for g in prepared.data.train for c in g.completions)
    again = sum(len(g.prompt_ids) * (len(g.completions) - 1) for g in prepared.data.train)
    assert train["tokens"]["plain"] == plain and train["tokens"]["saved_by_prefix_sharing"] == again / plain
    assert not any(word in line for line in prepared.data.report.lines() for word in ("chosen", "rejected", "pair"))


def test_plan_and_estimate_know_their_lengths(prepared: Prepared) -> None:
    precision = planned_precision(prepared.config, CPU)
    for tokens in (packed_tokens, padded_tokens):
        settled = fitted(prepared, CPU, precision, tokens)
        work = settled.work(tokens).work
        groups = list(settled.data.train)
        assert int(work.scored.sum()) == sum(len(c.ids) for g in groups for c in g.completions)
        found = estimate(settled, CPU, precision, tokens)
        assert found.fits and found.flops > 0
        assert np.isfinite(found.peak) and any("effective batch" in line for line in describe(settled, tokens))


def test_a_step_is_the_same_however_it_is_cut(prepared: Prepared) -> None:
    """And its loss is that of the formula, group by group."""
    policy = build_policy(prepared.config, prepared.model, torch.device("cpu"), tokenizer=prepared.tokenizer)
    groups = [prepared.data.train[i] for i in prepared.plan.groups(1)]
    gradients, losses = [], []
    for budget in (10**6, 1):
        parts = cut(groups, range(len(groups)), budget, packed_tokens)
        assert len(parts) == (1 if budget > 1 else len(groups))
        policy.zero_grad()
        batches = [policy.collate([groups[i] for i in part]) for part in parts]
        result = forward_backward(policy, prepared.objective, batches)
        losses.append(result.fetch().loss)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]))
    expected = 0.0
    with policy.scoring():
        for group in groups:
            scores = Scores.of(batch := policy.collate([group]), policy(batch))
            expected -= float((scores.sums(scores.logps) * torch.arange(1, 1 + len(group.completions))).sum())
    assert losses == pytest.approx([expected / len(groups)] * 2, rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
