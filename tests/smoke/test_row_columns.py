"""A column of numbers goes from a JSON line to an objective that declares it, whatever the shape of the rows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from torch import Tensor

import strop
from strop import prepared
from strop.batch import Scores
from strop.columns import Unit, completions
from strop.config.method_base import MethodSettings
from strop.config.methods import METHODS
from strop.data.store.group_numbers import unpaired
from strop.objectives.base import Mean, Objective
from strop.types import Completion, Group, Origin

Row = dict[str, Any]
PAIR = {"chosen": " yes yes", "rejected": " no"}


class Weighted(Objective[MethodSettings]):
    """The likelihood of every completion, times the row's numbers; it notes what it was given."""

    METRICS: ClassVar[Mapping[str, str]] = {}
    seen: ClassVar[list[dict[str, list[float]]]] = []

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self.settings.NUMBERS)

    @property
    def units(self) -> Mapping[str, Unit]:
        return {"weighted": completions}

    def terms(self, scores: Scores) -> Mapping[str, Tensor]:
        self.seen.append({name: scores[name].tolist() for name in self.reads})
        weights = scores["rewards"] if "rewards" in self.reads else scores["margin"][scores.group_index]
        return {"weighted": -(weights * scores.sums(scores.logps)).sum()}

    def metrics(self, scores: Scores) -> Mapping[str, Mean]:
        return {}


@pytest.mark.parametrize(
    ("method", "row", "given", "seen"),
    [
        ("simpo", PAIR, {"margin": 0.25}, {"margin": [0.25]}),
        ("simpo", PAIR, {"rewards": [1.5, -2.0]}, {"rewards": [1.5, -2.0]}),
        ("sft", {"completion": " yes"}, {"margin": 2, "rewards": [0.5]}, {"margin": [2.0], "rewards": [0.5]}),
        ("kto", {"completion": " yes", "label": True}, {"rewards": "[3.0]"}, {"rewards": [3.0]}),
        ("grpo", {"completions": [" a", " b", " c"]}, {"rewards": [True, 0, 0.5]}, {"rewards": [1.0, 0.0, 0.5]}),
    ],
)
def test_a_column_reaches_the_terms(
    method: str,
    row: Row,
    given: Row,
    seen: dict[str, list[float]],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(METHODS[method], "NUMBERS", tuple(given))
    monkeypatch.setattr(prepared, "build_objective", Weighted)
    monkeypatch.setattr(Weighted, "seen", [])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "hello", **row, **given}) + "\n")
    config = strop.load_config(
        overrides={
            "models.0.huggingface_id": str(model_dir),
            "post_training.method": method,
            "dataset.train_file": str(tmp_path / "rows.jsonl"),
            "dataset.validation_split": 0.0,
            "training.output_dir": str(tmp_path / "out"),
            "training.max_steps": 1,
            "training.per_device_train_batch_size": 1,
            "training.gradient_accumulation_steps": 1,
            "training.warmup_steps": 0,
        }
    )
    strop.train(config)
    assert Weighted.seen and all(found == seen for found in Weighted.seen)


def test_the_sides_of_a_pair_take_their_own_numbers_along() -> None:
    sides = tuple(Completion(array("i", ids), bytes([0] + [1] * (len(ids) - 1))) for ids in ([2, 3, 4], [5, 6]))
    numbers = {"rewards": [1.0, 2.0], "old_logps": [-1.0, -2.0, -3.0], "margin": [0.5]}
    pair = Group(
        array("i", [1]), sides, Origin("rows", 1), numbers={name: array("d", x) for name, x in numbers.items()}
    )
    chosen, rejected = ({name: list(x) for name, x in group.numbers.items()} for group in unpaired(pair))
    assert chosen == {"rewards": [1.0], "old_logps": [-1.0, -2.0], "margin": [0.5]}
    assert rejected == {"rewards": [2.0], "old_logps": [-3.0], "margin": [0.5]}


def test_settings_that_name_an_unknown_column_are_refused() -> None:
    with pytest.raises(TypeError, match=r"NUMBERS names grades: say in OF_COMPLETIONS, OF_TOKENS or OF_GROUPS"):

        class Graded(MethodSettings):
            NUMBERS: ClassVar[tuple[str, ...]] = ("grades",)
            method: Literal["graded"] = "graded"
