"""Groups, model sections and policies over the tiny model."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.config.run import RunConfig
from strop.policy.build import build_policy
from strop.policy.policy import Policy
from strop.types import Completion, Group, Origin

MakePolicy = Callable[..., Policy]


def make_group(prompt: int, *completions: int, seed: int = 0) -> Group:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> array[int]:
        return array("q", torch.randint(4, 400, (n,), generator=generator).tolist())

    return Group(draw(prompt), tuple(Completion(draw(n), b"\1" * n) for n in completions), Origin("rows", seed))


@pytest.fixture
def groups() -> list[Group]:
    return [make_group(7, 5, 4, seed=0), make_group(3, 1, 6, seed=1), make_group(9, 3, 8, seed=2)]


@pytest.fixture
def configure(model_dir: Path) -> Callable[..., RunConfig]:
    """configure(lora=..., training=..., post_training=..., **keys of the model) -> RunConfig over the tiny model."""

    def make(
        lora: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        post_training: Mapping[str, Any] | None = None,
        **model: Any,
    ) -> RunConfig:
        data: dict[str, Any] = {"models": [{"huggingface_id": str(model_dir), **model}]}
        if lora is not None:
            data["lora"] = dict(lora)
        return RunConfig(**data, training=dict(training or {}), post_training=dict(post_training or {"method": "sft"}))

    return make


@pytest.fixture
def build(configure: Callable[..., RunConfig]) -> MakePolicy:
    """As `configure`, and the policy built from it."""

    def make(**settings: Any) -> Policy:
        config = configure(**settings)
        return build_policy(config, config.models[0], torch.device("cpu"))

    return make
