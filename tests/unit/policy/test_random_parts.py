"""What a model draws at random in training is off, and what only sounds like it stays."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from benchmarks.tiny import tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from strop.config.sections import ModelSection
from strop.policy.model.load import load_model
from strop.policy.model.random_parts import silence_config


def test_dropouts_and_jitters_are_off_in_all_parts() -> None:
    config = CONFIG_MAPPING["gemma3"]()
    config.text_config.attention_dropout = 0.2
    assert silence_config(config) == {"attention_dropout": 0.2}
    assert config.text_config.attention_dropout == 0
    config = CONFIG_MAPPING["mixtral"](router_jitter_noise=0.1)
    assert silence_config(config) == {"router_jitter_noise": 0.1}


def test_a_jitter_that_inference_computes_with_stays() -> None:
    config = CONFIG_MAPPING["phimoe"](input_jitter_noise=0.2)
    assert silence_config(config) == {"input_jitter_noise": 0.2}
    assert config.router_jitter_noise == 0.01


def test_a_router_that_draws_experts_computes_as_in_inference(tmp_path: Path) -> None:
    config = tiny_config("phimoe", router_jitter_noise=0.3)  # so wide that many experts are drawn from
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    module = load_model(ModelSection(huggingface_id=str(tmp_path)), dtype=torch.float32).module.train()
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        want = plain(ids).logits
        for model in (module, module, copy.deepcopy(module).train()):
            torch.testing.assert_close(model(ids).logits, want)
        drawn = plain.train()(ids).logits
    assert not torch.allclose(drawn, want)
