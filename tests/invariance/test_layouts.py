"""Shared rows = padded rows = one plain row at a time through transformers, logps and gradients, every architecture."""

from __future__ import annotations

import copy
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from benchmarks.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from strop.batch import pack, pad
from strop.config.sections import ModelSection
from strop.policy import prefix_sharing
from strop.policy.build import assemble
from strop.policy.gradient_checkpointing import checkpoint_layers
from strop.policy.model.load import LoadedModel
from strop.policy.model.random_parts import silence_config, silence_modules
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.types import Completion, Group, Origin

VOCABULARY = 97
# windows of 4 are shorter than the prompts of 7 and 9 below
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {"num_hidden_layers": 4, "layer_types": WINDOWED["layer_types"] * 2, "global_head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": WINDOWED,
    "cohere2_moe": WINDOWED,
    "cwm": WINDOWED,
    "exaone4": WINDOWED,
    "exaone_moe": WINDOWED,
    "gemma2": {
        **WINDOWED,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3": {"text_config": {**WINDOWED, "query_pre_attn_scalar": 8}},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 8},
    "gemma4": {"text_config": {**GEMMA4, "use_bidirectional_attention": "vision"}},
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gemma4_text": {**GEMMA4, "num_kv_shared_layers": 2, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "granitemoe": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "granitemoeshared": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": WINDOWED,
    "granite_swa": WINDOWED,
    "granitemoe_swa": WINDOWED,
    "mimo_v2_flash": WINDOWED,
    "ministral": WINDOWED,
    "ministral3": {
        "sliding_window": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,  # queries grow with their position
            "original_max_position_embeddings": 4,
        },
    },
    "mixtral": {"sliding_window": 4},
    "olmo3": WINDOWED,
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "vaultgemma": {**WINDOWED, "query_pre_attn_scalar": 8},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gemma4_text", {**GEMMA4, "attention_k_eq_v": True}),
    (
        "gemma4_text",
        {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}},
    ),
]
"""Further settings of an architecture that change how its tokens mix."""
# these models' own code computes norms or routers in float32 by a method that the float64 stand-in does not reach
ROUNDED = {
    "cohere",
    "cohere2",
    "cohere2_moe",
    "deepseek_v2",
    "ernie4_5",
    "ernie4_5_moe",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "minimax_m2",
    "mixtral",
    "nanochat",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "vaultgemma",
}


class Float64Torch:
    """Stands for torch in a modelling file, so that its float32 norms and softmaxes are float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def make_policy(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float64,
    changes: Mapping[str, Any] | None = None,
) -> Policy:
    config = tiny_config(kind, **(OWN.get(kind, {}) if changes is None else changes))
    silence_config(config)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    silence_modules(model)
    for weight in model.parameters():
        if weight.ndim == 1:  # norms and biases that are not 1 and 0
            weight.data += 0.2 * torch.randn_like(weight)
    if dtype == torch.float64:
        monkeypatch.setattr(sys.modules[type(model).__module__], "torch", Float64Torch())
    if kind == "gemma2":  # as load_model does for capped scores
        model.set_attn_implementation("eager")
    loaded = LoadedModel(model, dtype, copy.deepcopy(config))
    return assemble(model, loaded, Precision(dtype), ModelSection(huggingface_id=kind), fp32_logits=False)


def make_group(prompt: int, completions: Sequence[int], seed: int) -> Group:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> array[int]:
        return array("q", torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())

    # a token in the middle is not trained, as between two assistant turns
    return Group(
        draw(prompt),
        tuple(
            Completion(draw(n), bytes(int(j != 1 or n == 1) for j in range(n)) if n > 1 else b"\1") for n in completions
        ),
        Origin("rows", seed),
    )


GROUPS = [make_group(7, (5, 4), 0), make_group(3, (1, 6, 2), 1), make_group(9, (3,), 2)]


def oracle(policy: Policy, attention: str) -> tuple[Tensor, dict[str, Tensor]]:
    """One row at a time through the causal language model itself, without padding, and its gradients."""
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation(attention)
    parts = []
    for group in GROUPS:
        for completion in group.completions:
            row = [*group.prompt_ids, *completion.ids]
            logps = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            first = len(group.prompt_ids)
            parts += [logps[first + j - 1, t] for j, t in enumerate(completion.ids) if completion.loss_mask[j]]
    logps = torch.stack(parts)
    (logps * coefficients(len(logps))).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run(policy: Policy, batches: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of several micro-batches, and the gradients of one function of them all; both on the CPU."""
    policy.zero_grad()
    weights = coefficients(sum(len(b.targets) for b in batches))
    parts = []
    for batch in batches:
        logps = policy(batch.to(policy.device)).logps.cpu()
        (logps * weights[: len(logps)]).sum().backward()
        weights = weights[len(logps) :]
        parts.append(logps.detach())
    gradients = {n: p.grad.cpu().clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return torch.cat(parts), gradients


def coefficients(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    assert got[1].keys() == want[1].keys()
    size = torch.stack([g.norm() for g in want[1].values()]).norm()
    for name, gradient in want[1].items():
        # some gradients are zero but for rounding (a key's bias), so they are measured by all of them
        assert (got[1][name] - gradient).norm() <= tolerance * (gradient.norm() + 0.01 * size), name


@pytest.mark.share(6)
@pytest.mark.parametrize(
    ("kind", "changes"), [*((kind, None) for kind in sorted(prefix_sharing.ARCHITECTURES)), *VARIANTS]
)
def test_layouts_agree(kind: str, changes: Mapping[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(kind, monkeypatch, changes=changes)
    assert policy.share_prefix, policy.plain_reason
    tolerance = 1e-6 if kind in ROUNDED else 1e-9
    shared = run(policy, [pack(GROUPS)])
    assert_same(run(policy, [pad(GROUPS)]), shared, tolerance)
    assert_same(oracle(policy, "eager"), shared, tolerance)
    if policy.plain_attention == "sdpa":
        assert_same(oracle(policy, "sdpa"), shared, tolerance)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_kernels_and_cuts_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(kind, monkeypatch)
    tolerance = 1e-6 if kind in ROUNDED else 1e-9
    whole = run(policy, [pack(GROUPS)])
    assert_same(run(policy, [pack([g]) for g in GROUPS]), whole, tolerance)
    assert_same(run(policy, [pad([g]) for g in GROUPS]), whole, tolerance)
    policy.kernel = "dense"
    assert_same(run(policy, [pack(GROUPS)]), whole, tolerance)


@pytest.mark.parametrize("layout", [pack, pad])
@pytest.mark.parametrize("kind", ["gemma4_text", "gpt_oss"])
def test_layers_that_compute_their_activations_again(
    kind: str, layout: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers read keys of others, or sinks."""
    policy = make_policy(kind, monkeypatch)
    want = run(policy, [layout(GROUPS)])
    checkpoint_layers(policy.model, 1.0, random=False, where="here")
    assert_same(run(policy, [layout(GROUPS)]), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("llama", "cpu"),
        ("mistral", "cpu"),
        *(pytest.param(kind, "cuda", marks=pytest.mark.gpu) for kind in ("llama", "mistral", "gemma2")),
    ],
)
def test_layouts_agree_in_the_dtypes_of_training(
    kind: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    exact = run(make_policy(kind, monkeypatch), [pack(GROUPS)])
    monkeypatch.undo()
    policy = make_policy(kind, monkeypatch, torch.float32).to(device)
    monkeypatch.setattr("strop.policy.build.fuse", lambda *_: None)
    naive = make_policy(kind, monkeypatch, torch.float32).to(device)  # with the forwards that transformers gives layers
    for found in (policy, naive):
        found.precision, found.head_dtype = Precision(dtype), dtype
    errors = []
    for found, layout in ((policy, pack), (policy, pad), (naive, pad)):
        logps, gradients = run(found, [layout(GROUPS)])
        want = torch.cat([g.flatten() for g in exact[1].values()])
        got = torch.cat([g.flatten() for g in gradients.values()])
        errors.append(((logps - exact[0]).abs().max(), (got - want).norm() / want.norm()))
    floor = 100 * torch.finfo(torch.float32).eps
    shared, plain, unfused = errors
    for of_logps, of_gradients in (shared, plain):  # neither sharing nor fused layers round worse
        assert of_logps <= 2 * unfused[0] + floor
        assert of_gradients <= 2 * unfused[1] + floor


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_completions_are_blind_to_each_other(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(kind, monkeypatch, torch.float32)
    group = GROUPS[1]
    first, second, third = group.completions
    other = Completion(array("q", [5, 6, 7, 8, 9, 10]), second.loss_mask)
    with policy.scoring():
        before = policy(pack([group])).logps
        after = policy(pack([Group(group.prompt_ids, (first, other, third), group.origin)])).logps
    assert torch.equal(before[: first.num_scored], after[: first.num_scored])
    assert torch.equal(before[-third.num_scored :], after[-third.num_scored :])
    assert not torch.equal(before, after)


def test_groups_are_blind_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", monkeypatch, torch.float32)
    with policy.scoring():
        together = policy(pack([GROUPS[0], GROUPS[1]])).logps
        beside_another = policy(pack([GROUPS[0], make_group(3, (1, 6, 2), 9)])).logps
    n = GROUPS[0].num_scored
    assert torch.equal(together[:n], beside_another[:n])
    assert not torch.equal(together[n:], beside_another[n:])


def test_same_batch_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", monkeypatch, torch.float32)
    one, two = run(policy, [pack(GROUPS)]), run(policy, [pack(GROUPS)])
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_layouts_agree_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    policy = make_policy(kind, monkeypatch, torch.float32)
    on_cpu = run(policy, [pack(GROUPS)])[0]
    policy.cuda()
    with policy.scoring():
        for batch in (pack(GROUPS), pad(GROUPS)):
            torch.testing.assert_close(policy(batch.to(policy.device)).logps.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
