"""Runs in which nothing is wrong: every method, and variants that count otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.scenarios.models import TinyModel
from benchmarks.scenarios.scenario import Scenario

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sft": {},
    "dpo": {},
    "dpo hinge": {"post_training.loss_type": "hinge"},
    "dpo apo_zero": {"post_training.loss_type": "apo_zero"},
    "dpo sigmoid_norm": {"post_training.loss_type": "sigmoid_norm", "post_training.beta": 1.0},
    "ipo": {},
    "kto": {},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "grpo": {},
    "grpo dr_grpo": {"post_training.algorithm": "dr_grpo"},
    "grpo with a reference": {"post_training.beta": 0.05, "rollout.num_iterations": 2},
    "dpo online": {"post_training.online": True, "rollout.num_generations": 6},
    "reward": {},
    "distill": {"post_training.teacher_model_id": TinyModel.OTHER},
}
"""The method, a word about the variant, and its settings."""
HEALTHY = [Scenario(f"healthy {name}", name.split()[0], keys=keys) for name, keys in VARIANTS.items()]
