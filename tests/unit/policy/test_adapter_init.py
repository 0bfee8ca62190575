"""Adapters that begin with a part of the base: the model is its base until the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from strop.config.run import RunConfig
from strop.config.sections import ModelSection
from strop.errors import ConfigError, ModelError
from strop.policy.model.tokenizer import load_tokenizer
from strop.policy.policy import Policy
from strop.types import Group

MakePolicy = Callable[..., Policy]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
INITS = ["gaussian", "pissa", "pissa_niter_4", "olora"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def logps(policy: Policy, groups: list[Group]) -> Tensor:
    with policy.scoring():
        return policy(policy.collate(groups)).logps


def plain_logps(model: nn.Module, groups: list[Group]) -> Tensor:
    """Plain transformers, a row at a time."""
    parts = []
    with torch.no_grad():
        for group in groups:
            for c in group.completions:
                scores = model(input_ids=torch.tensor([[*group.prompt_ids, *c.ids]])).logits[0].log_softmax(-1)
                parts += [scores[len(group.prompt_ids) + j - 1, t] for j, t in enumerate(c.ids)]
    return torch.stack(parts)


def move(policy: Policy) -> None:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.05 * torch.randn(weight.shape, generator=random)


@pytest.mark.share(1)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "lora", [{"r": 4}, {"r": 3, "use_rslora": True, "modules_to_save": ["norm"]}], ids=["lora", "rslora and a norm"]
)
def test_the_saved_adapter_is_right_on_the_base_as_it_is(
    init: str, lora: dict[str, Any], build: MakePolicy, model_dir: Path, groups: list[Group], tmp_path: Path
) -> None:
    before = (model_dir / "model.safetensors").read_bytes()
    base = plain_logps(AutoModelForCausalLM.from_pretrained(model_dir), groups)
    policy = build(lora={**lora, "init_lora_weights": init})
    torch.testing.assert_close(logps(policy, groups), base, **CLOSE)  # the reference, too
    first = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    moved = init != "gaussian"
    assert all(bool(w.any()) == moved for name, w in first.items() if "lora_B" in name)
    move(policy)
    trained = logps(policy, groups)
    assert (trained - base).abs().max() > 0.05
    policy.save_pretrained(tmp_path / "final", load_tokenizer(ModelSection(huggingface_id=str(model_dir))))
    config = json.loads((tmp_path / "final/adapter_config.json").read_text())
    assert config["r"] == lora["r"] * (2 if moved else 1) and config["init_lora_weights"] in (True, "gaussian")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    torch.testing.assert_close(plain_logps(again, groups), trained, **CLOSE)
    assert (model_dir / "model.safetensors").read_bytes() == before
    continued = build(adapter=str(tmp_path / "final"))
    torch.testing.assert_close(logps(continued, groups), trained, **CLOSE)


def test_the_same_seed_begins_with_the_same_adapter(build: MakePolicy) -> None:
    one, two = (build(lora={"r": 4, "init_lora_weights": "pissa_niter_2"}).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_in_16_bits_the_base_loses_what_the_adapter_has(build: MakePolicy, groups: list[Group]) -> None:
    plain, moved = (
        logps(build(lora={"r": 8, "init_lora_weights": init}, training={"bf16": True}), groups)
        for init in (True, "pissa")
    )
    assert (plain - moved).abs().max() < 0.1


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is corda"),
        ({"init_lora_weights": "pissa_niter_0"}, "pissa_niter_0"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora: true normalises"),
        ({"init_lora_weights": "olora", "target_parameters": ["experts.down_proj"]}, "begin with 0 alone"),
    ],
)
def test_what_cannot_begin_so(lora: dict[str, Any], said: str, configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=said):
        configure(lora=lora)


def test_quantised_bases_keep_their_weights(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="quantised ones cannot be changed by so little"):
        configure(lora={"init_lora_weights": "pissa"}, quant="4bit")
    configure(lora={"init_lora_weights": "gaussian"}, quant="4bit")


def test_layers_that_lie_the_other_way_round(build: MakePolicy, model_dir: Path, groups: list[Group]) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)).save_pretrained(model_dir)
    base = plain_logps(AutoModelForCausalLM.from_pretrained(model_dir), groups)
    torch.testing.assert_close(logps(build(lora={"init_lora_weights": "pissa"}), groups), base, **CLOSE)
    with pytest.raises(ModelError, match="stored transposed"):
        build(lora={"init_lora_weights": "olora"})
