"""Recomputed activations: the right number of layers, the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from strop.batch import pack, pad
from strop.errors import ModelError
from strop.policy.gradient_checkpointing import checkpoint_layers
from strop.policy.policy import Policy
from strop.types import Group


@pytest.mark.parametrize(
    ("share", "want"),
    [
        (False, []),
        (True, [0, 1, 2, 3, 4, 5]),
        (0.5, [1, 3, 5]),
        (0.34, [2, 5]),
        (0.01, [5]),
        (0.99, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_share_is_evenly_spread(share: bool | float, want: list[int]) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=6, num_attention_heads=1, vocab_size=8))
    assert checkpoint_layers(model, share, random=False, where="model x") == len(want)
    assert [i for i, layer in enumerate(model.model.layers) if layer.gradient_checkpointing] == want


def test_models_without_such_layers() -> None:
    assert checkpoint_layers(nn.Linear(1, 1), False, random=False, where="model x") == 0
    with pytest.raises(ModelError, match="no layers that transformers can checkpoint"):
        checkpoint_layers(nn.Linear(1, 1), 0.5, random=False, where="model x")


def forwards(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which layers run, in order."""
    ran: list[int] = []
    layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    for i, layer in enumerate(layers):
        attention = layer.self_attn

        def forward(*args: Any, i: int = i, inner: Callable[..., Any] = attention.forward, **kwargs: Any) -> Any:
            ran.append(i)
            return inner(*args, **kwargs)

        monkeypatch.setattr(attention, "forward", forward)
    return ran


@pytest.mark.share(1)
@pytest.mark.parametrize("lora", [None, {"lora_dropout": 0.3}], ids=["full", "lora"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_gradients_are_the_same(
    lora: dict[str, Any] | None,
    precision: dict[str, bool],
    build: Callable[..., Policy],
    groups: list[Group],
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Path,
) -> None:
    results: dict[Any, dict[str, Tensor]] = {}
    for share in (False, True, 0.5):
        for layout in (pack, pad):
            policy = build(lora=lora, training={"gradient_checkpointing": share, **precision})
            for name, weight in policy.trainable().items():
                if "lora_B" in name:
                    nn.init.constant_(weight, 0.1)
            ran = forwards(policy, monkeypatch)
            torch.manual_seed(7)  # dropout must be drawn as in the first pass
            policy(layout(groups)).logps.sum().backward()
            assert ran == {False: [0, 1], True: [0, 1, 1, 0], 0.5: [0, 1, 1]}[share]
            results[share, layout] = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
            monkeypatch.undo()
            plain = results[False, layout]
            assert results[share, layout].keys() == plain.keys() == policy.trainable().keys()
            assert all(torch.equal(results[share, layout][n], plain[n]) for n in plain)
            with policy.scoring():
                ran = forwards(policy, monkeypatch)
                policy(layout(groups))
                assert ran == [0, 1]
            monkeypatch.undo()
