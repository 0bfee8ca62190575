"""Runs of several processes, and their comparison with a run of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import strop
from processes import in_processes
from strop import RunConfig

KINDS: dict[str, dict[str, Any]] = {
    "sft": {"post_training.method": "sft"},
    "dpo": {"post_training.method": "dpo"},
    "kto_pair": {"post_training.method": "dpo", "post_training.loss_type": "kto_pair"},
    "kto": {"post_training.method": "kto"},
    "orpo": {"post_training.method": "orpo"},
    "simpo": {"post_training.method": "simpo"},
}
"""One method of each kind."""
FULL: dict[str, Any] = {}
LORA: dict[str, Any] = {"lora.r": 4, "lora.lora_dropout": 0.0}
CUT = {"training.micro_batch_tokens": 64, "training.groups_per_step": 4, "training.learning_rate": 1e-3}
RELATIVE = 1e-5


def train(config: RunConfig, resume: str | None = None) -> list[Path]:
    return [result.run_dir for result in strop.train(config, resume=resume)]


def in_many(size: int, config: RunConfig, resume: str | None = None) -> Path:
    """The folder of the run of so many processes, which all of them name."""
    folders = in_processes(size, train, config, resume)
    assert folders == folders[:1] * size
    return folders[0][0]


def assert_close(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert float((two[name] - weight).norm()) <= RELATIVE * float(weight.norm()), name


def assert_same_run(one: Any, two: Any) -> None:
    """Every record, every margin and every weight."""
    assert len(one.untimed) == len(two.untimed)
    for before, after in zip(one.untimed, two.untimed, strict=True):
        assert before.keys() == after.keys()
        before.pop("weights_digest", None)  # of the bits, which sums in another order move
        if before["step"] <= 1:
            # the policy is still its reference: the signs of the rewards are those of rounding
            before.pop("rewards/accuracies", None)
        for name, value in before.items():
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert after[name] == close, (name, before["step"])
    arrays = [sorted(run.path.glob("logs/margins/*/*.npy")) for run in (one, two)]
    assert [path.name for path in arrays[0]] == [path.name for path in arrays[1]]
    for a, b in zip(*arrays, strict=True):
        np.testing.assert_allclose(np.load(b), np.load(a), rtol=1e-4, atol=1e-5)
    assert_close(one.final, two.final)
