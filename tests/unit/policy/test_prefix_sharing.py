"""Which models get shared rows, and what the probe is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from strop.policy.prefix_sharing import (
    PROBE_LENGTHS,
    PROBE_UNCHANGED,
    mean_apart,
    probe_group,
    reason_against,
    rope_threshold,
    tolerance,
)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {}, None),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, None),
        ("gemma3_text", {}, None),
        ("gemma4_text", {"use_bidirectional_attention": "vision"}, None),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "bidirectional"),
        ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "alpha": 1e3, "rope_theta": 1e4}}, None),
        ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "(dynamic)"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "alpha": 1e3, "rope_theta": 1e4}}, "(dynamic)"),
        ("mamba", {}, "it has layers of the kind"),
        ("bloom", {}, "the attention of the architecture bloom cannot be replaced"),
        ("diffllama", {}, "sharing is not tested with the architecture diffllama"),
        ("qwen3_next", {}, "layers of the kind linear_attention"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "layers of the kind linear_attention"),
        ("llama", {"layer_types": ["conv", "chunked_attention"]}, "kind chunked_attention, conv"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "(dynamic)"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None),
    ],
)
def test_reasons(kind: str, changes: dict[str, Any], reason: str | None) -> None:
    config = CONFIG_MAPPING[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    found = reason_against(config)
    assert found is None if reason is None else found is not None and reason in found


def test_a_model_around_a_text_model_is_judged_by_its_text_model() -> None:
    config = CONFIG_MAPPING["gemma3"]()
    assert reason_against(config) is None
    config.text_config.use_bidirectional_attention = True
    assert "bidirectional" in (reason_against(config) or "")
    config = CONFIG_MAPPING["gemma3"]()
    config.text_config.layer_types = ["full_attention", "conv"]
    assert "kind conv" in (reason_against(config) or "")
    config = CONFIG_MAPPING["gemma3"]()
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config.text_config.max_position_embeddings = 64
    assert "(dynamic)" in (reason_against(config) or "") and rope_threshold(config) == 64


def test_rotary_settings_that_stand_by_layer_type() -> None:
    config = CONFIG_MAPPING["gemma3_text"](max_position_embeddings=64)
    assert rope_threshold(config) is None
    for kind in ("full_attention", "sliding_attention"):
        config.rope_parameters = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        config.rope_parameters[kind] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        assert reason_against(config) is not None
        assert rope_threshold(config) == 64


def test_the_probe_is_always_the_same_and_its_third_completion_tells_about_later_tokens() -> None:
    group, again = probe_group(50), probe_group(50)
    assert group == again and max(group.prompt_ids) < 50
    first, second, third = group.completions
    assert (len(group.prompt_ids), len(first.ids), len(second.ids)) == PROBE_LENGTHS
    assert first.ids[:PROBE_UNCHANGED] == third.ids[:PROBE_UNCHANGED]
    assert first.ids[PROBE_UNCHANGED] != third.ids[PROBE_UNCHANGED]
    assert len(third.ids) - 1 > PROBE_UNCHANGED  # the changed token is fed
    probe_group(1)  # the smallest vocabulary there is


def test_the_tolerance_grows_with_rounding() -> None:
    values = [tolerance(dtype, 0.0) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert values == sorted(values) and len(set(values)) == 4 and values[-1] < 0.05
    assert tolerance(torch.bfloat16, 0.5) > 1
    assert mean_apart(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 5.0, 0.0])) == 3.0
